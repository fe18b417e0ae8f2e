"""Whatever links and hops do to each other, no row is skipped or computed from wrong inputs."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from petals.protocol import log, prefix
from petals.protocol.chain import ChainState
from petals.protocol.span import Span
from support.ring_world import MAX_TOKENS, ME, NUM_BLOCKS, RingWorld, reference


def split(cuts: frozenset[int], whole: Span) -> list[Span]:
    inner = sorted(cut for cut in cuts if whole.start < cut < whole.end)
    bounds = [whole.start, *inner, whole.end]
    return [Span(start, end) for start, end in itertools.pairwise(bounds)]


cuts = st.frozensets(st.integers(1, NUM_BLOCKS - 1), max_size=4)
branches = st.sampled_from([0, 0, 0, 1])


class Ring(RuleBasedStateMachine):
    batch = 1

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(prefix, "PREFIX_ROWS", 3)
        self.world = RingWorld(split(frozenset({2, 4}), Span(0, NUM_BLOCKS)), self.batch)

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.world.wires)))

    @precondition(lambda self: len(self.world.tokens) < MAX_TOKENS)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, min(6, MAX_TOKENS - len(self.world.tokens))))
        self.world.append(count, data.draw(st.integers(1, count)), data.draw(branches))

    @rule(
        cuts=st.sampled_from([frozenset({2, 4}), frozenset({3})]), data=st.data(), branch=branches
    )
    def again(self, cuts: frozenset[int], data: st.DataObject, branch: int) -> None:
        count = data.draw(st.integers(1, 12))
        want = data.draw(st.integers(1, count))
        self.world.again(split(cuts, Span(0, NUM_BLOCKS)), count, want, branch)

    @precondition(lambda self: self.world.tokens)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        self.world.rewind(data.draw(st.integers(0, len(self.world.tokens) - 1)))

    @rule(passes=st.integers(1, 8), max_rows=st.integers(1, 3))
    def advance(self, passes: int, max_rows: int) -> None:
        for _ in range(passes):
            self.world.advance(max_rows)

    @rule()
    def settle(self) -> None:
        self.world.settle()

    @rule(data=st.data(), max_rows=st.integers(1, 5))
    def transmit(self, data: st.DataObject, max_rows: int) -> None:
        self.world.transmit(self.pick(data), max_rows)

    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self.world.deliver(self.pick(data))

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        self.world.answer(self.pick(data))

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        wire = self.world.wires[self.pick(data)]
        if wire.forward:
            wire.forward.popleft()

    @rule(data=st.data())
    def duplicate(self, data: st.DataObject) -> None:
        wire = self.world.wires[self.pick(data)]
        if wire.forward:
            wire.forward.append(wire.forward[0])

    @rule(data=st.data())
    def delay(self, data: st.DataObject) -> None:
        self.world.wires[self.pick(data)].forward.rotate(-1)

    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        self.world.cut(self.pick(data))

    @rule(data=st.data())
    def dial(self, data: st.DataObject) -> None:
        self.world.dial(self.pick(data))

    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        self.world.compute(data.draw(st.sampled_from(sorted(self.world.relays))))

    @rule()
    def send_back(self) -> None:
        self.world.send_back()

    @rule(data=st.data(), cuts=cuts)
    def replace(self, data: st.DataObject, cuts: frozenset[int]) -> None:
        dead = data.draw(st.sampled_from(sorted(self.world.relays)))
        self.world.lose(dead)
        for missing in self.world.chain.missing:
            self.world.route(split(cuts, missing))

    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        self.world.reopen(data.draw(st.sampled_from(sorted(self.world.relays))))

    @rule(data=st.data())
    def cut_control(self, data: st.DataObject) -> None:
        self.world.cut_control(data.draw(st.sampled_from(sorted(self.world.relays))))

    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        self.world.restart(data.draw(st.sampled_from(sorted(self.world.relays))))

    @rule(data=st.data())
    def cut_beside_a_gap(self, data: st.DataObject) -> None:
        relays = sorted(self.world.relays)
        dead = data.draw(st.sampled_from(relays))
        cut = data.draw(st.sets(st.sampled_from(relays)))
        self.world.cut_beside_a_gap(dead, cut, data.draw(st.integers(0, 6)))

    @rule()
    def cut_own_link(self) -> None:
        self.world.cut_own_link()

    @rule(data=st.data())
    def replace_several(self, data: st.DataObject) -> None:
        relays = sorted(self.world.relays)
        for dead in data.draw(st.lists(st.sampled_from(relays), min_size=1, unique=True)):
            self.world.lose(dead)
        self.world.route(self.world.chain.missing)

    @invariant()
    def rows_that_came_back_are_right(self) -> None:
        right = reference(self.world.tokens)
        assert all(row == right[at] for at, row in self.world.delivered.items())

    def teardown(self) -> None:
        """However bad it was: once links hold again, everything wanted comes back."""
        try:
            self.mend()
        finally:
            self.patch.undo()

    def mend(self) -> None:
        world = self.world
        if world.tokens:
            first = world.chain.hops[0]
            for sender in sorted(world.wires):
                world.cut(sender)
            world.lose(first.peer.peer_id)
            world.route([first.span])
            world.settle()
            assert world.chain.expected == world.chain.length == len(world.tokens)
            assert world.chain.state is ChainState.RUNNING
            self.rows_that_came_back_are_right()
        world.close()
        assert not world.relays
        assert ME in world.wires


class BeamRing(Ring):
    """Sequences of a batch take the place of others, as in beam search."""

    batch = 3

    def __init__(self) -> None:
        super().__init__()
        self.patch.setattr(log, "MAX_PAST", 4)

    @precondition(lambda self: 0 < len(self.world.tokens) < MAX_TOKENS)
    @rule(data=st.data(), order=st.tuples(*[st.integers(0, 2)] * 3), rounds=st.integers(1, 6))
    def reorder(self, data: st.DataObject, order: tuple[int, ...], rounds: int) -> None:
        """As a beam search goes on: at the end, a token, and again; now and then it goes back."""
        tokens = self.world.tokens
        for _ in range(min(rounds, MAX_TOKENS - len(tokens))):
            length = len(self.world.tokens)
            back = data.draw(st.sampled_from([0, 0, 0, 0, 1, 2, length]))
            self.world.rewind(max(0, length - back), order)
            self.world.append(1, 1)
            for _ in range(data.draw(st.integers(0, 4))):
                self.world.advance(3)


Ring.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestRing = Ring.TestCase
BeamRing.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestBeamRing = BeamRing.TestCase
