"""The loop that moves a node, on trio's own clock."""

from collections.abc import Sequence

import pytest
import trio
from petals.node.rebalance import Rebalance, RebalanceSettings
from petals.protocol.errors import ModelError, PeerError
from petals.protocol.placement import Move
from petals.protocol.span import Span
from trio.testing import MockClock

SETTINGS = RebalanceSettings()
INTERVAL = 5.0
THERE = Move(Span(2, 4), urgent=False)
AT_ONCE = Move(Span(2, 4), urgent=True)


class Half:
    """Dice that always fall in the middle."""

    def random(self) -> float:
        return 0.5

    def getrandbits(self, bits: int) -> int:
        return 0


class Swarm:
    """What the loop is told, one look after the other, and what it does, with the time."""

    def __init__(self, *looks: Move | None, failing: Sequence[Exception] = ()) -> None:
        self.looks = list(looks)
        self.failing = list(failing)
        self.moves: list[tuple[float, Span]] = []
        self.looked = self.refreshed = 0
        self.unreadable = False
        self.cut_off = False

    async def look(self) -> Move | None:
        await trio.lowlevel.checkpoint()
        self.looked += 1
        if self.unreadable:
            raise PeerError("nobody answers")
        return self.looks.pop(0) if self.looks else None

    async def refresh(self) -> None:
        await trio.lowlevel.checkpoint()
        self.refreshed += 1
        if self.cut_off:
            raise PeerError("nobody answers")

    async def move(self, span: Span) -> None:
        await trio.lowlevel.checkpoint()
        self.moves.append((trio.current_time(), span))
        if self.failing:
            raise self.failing.pop(0)


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0)


def run(swarm: Swarm, seconds: float, clock: MockClock) -> None:
    async def main() -> None:
        rebalance = Rebalance(
            interval=lambda: INTERVAL,
            look=swarm.look,
            refresh=swarm.refresh,
            move=swarm.move,
            dice=Half(),
            settings=SETTINGS,
        )
        with trio.move_on_after(seconds):
            await rebalance.run()

    trio.run(main, clock=clock)


def test_a_node_waits_and_looks_again_before_it_moves(clock: MockClock) -> None:
    swarm = Swarm(None, THERE, THERE)
    run(swarm, 100, clock)
    assert swarm.moves == [(2 * INTERVAL + SETTINGS.wait / 2, THERE.span)]
    assert swarm.refreshed == 1, "what it knows is fresh"


def test_it_stays_if_there_is_no_more_reason(clock: MockClock) -> None:
    swarm = Swarm(THERE, None)
    run(swarm, 100, clock)
    assert not swarm.moves


def test_it_goes_where_it_should_go_by_then(clock: MockClock) -> None:
    swarm = Swarm(THERE, Move(Span(0, 2), urgent=False))
    run(swarm, 100, clock)
    assert [span for _, span in swarm.moves] == [Span(0, 2)]


def test_blocks_that_nobody_serves_are_taken_in_seconds(clock: MockClock) -> None:
    swarm = Swarm(AT_ONCE, AT_ONCE)
    run(swarm, 100, clock)
    assert swarm.moves == [(INTERVAL + SETTINGS.urgent_wait / 2, AT_ONCE.span)]


def test_a_node_that_cannot_load_its_new_blocks_tries_again_much_later(clock: MockClock) -> None:
    swarm = Swarm(AT_ONCE, AT_ONCE, AT_ONCE, AT_ONCE, failing=[ModelError("the disk is full")])
    run(swarm, 1000, clock)
    (first, _), (second, _) = swarm.moves
    assert second - first >= SETTINGS.failed_pause


def test_a_node_that_has_lost_the_swarm_stays(clock: MockClock) -> None:
    swarm = Swarm(AT_ONCE, AT_ONCE, AT_ONCE, AT_ONCE)
    swarm.cut_off = True
    run(swarm, 100, clock)
    assert swarm.refreshed > 1
    assert not swarm.moves


def test_a_node_that_cannot_look_tries_again(clock: MockClock) -> None:
    swarm = Swarm(AT_ONCE, AT_ONCE)
    swarm.unreadable = True
    run(swarm, 100, clock)
    assert swarm.looked > 1
    assert not swarm.moves
