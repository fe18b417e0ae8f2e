"""A ring of hops in one thread, over links that drop, duplicate, delay and break.

The forward pass is SHA-256: a block's output at a position depends on its own number and on all
inputs of its sequence up to that position, so a row that was skipped, repeated or computed from
anything but the right inputs gives an output that differs, whatever the split into hops.

Peers keep what they have computed under the labels that their hops give it, and restore it for later
sessions. Two things under one label fail at once, in whichever session.
"""

import collections
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from petals.protocol.chain import (
    Chain,
    ChainHop,
    Closed,
    Deliver,
    DropHop,
    HopCut,
    HopLost,
    HopReady,
    LinkCut,
    LinkFirst,
    OpenHop,
    RelinkHop,
    Returned,
    Routed,
    SessionTerms,
)
from petals.protocol.chain import Effect as ChainEffect
from petals.protocol.checks import Peer
from petals.protocol.frames import Open, Output, Resume, Step
from petals.protocol.hop import (
    Compute,
    Computed,
    DialSuccessor,
    Hop,
    Linked,
    Reopened,
    Reply,
    SuccessorLost,
    Welcome,
    offered_keys,
    same_session,
)
from petals.protocol.hop import Event as HopEvent
from petals.protocol.prefix import HashedInputs
from petals.protocol.span import Span
from petals.protocol.tensor import DType, WireTensor

HIDDEN_SIZE = 8
"""Of float32: 32 bytes a row, one digest."""
NUM_BLOCKS = 6
MAX_TOKENS = 40
ME = "me"

T = TypeVar("T")

Row = tuple[bytes, ...]
"""At one position, a digest of each sequence of the batch."""


def reordered(rows: Iterable[tuple[T, ...]], order: tuple[int, ...]) -> list[tuple[T, ...]]:
    return [tuple(row[lane] for lane in order) if order else row for row in rows]


def embed(tokens: tuple[int, ...]) -> Row:
    return tuple(hashlib.sha256(b"token %d" % token).digest() for token in tokens)


class Cache:
    """Per block, its state behind every position: what a KV cache is to a real block."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.states: list[list[Row]] = [[] for _ in range(len(span))]

    def run(self, position: int, rows: list[Row], order: tuple[int, ...] = ()) -> list[Row]:
        for index, block in enumerate(range(self.span.start, self.span.end)):
            states = reordered(self.states[index], order)
            assert position <= len(states), f"a gap: {len(states)} cached, step at {position}"
            del states[position:]
            for row in rows:
                before = states[-1] if states else (b"",) * len(row)
                states.append(
                    tuple(
                        hashlib.sha256(b"%d " % block + old + new).digest()
                        for old, new in zip(before, row, strict=True)
                    )
                )
            rows, self.states[index] = states[position:], states
        return rows


@dataclass(frozen=True)
class Kept:
    """What a peer has stored under a label: states per block, outputs."""

    states: list[list[Row]]
    outputs: list[Row]


def reference(tokens: list[tuple[int, ...]]) -> list[Row]:
    return Cache(Span(0, NUM_BLOCKS)).run(0, [embed(at_once) for at_once in tokens])


def to_tensor(rows: list[Row]) -> WireTensor:
    lanes = list(zip(*rows, strict=True))
    data = b"".join(digest for lane in lanes for digest in lane)
    return WireTensor(DType.FLOAT32, (len(lanes), len(rows), HIDDEN_SIZE), data)


def to_rows(tensor: WireTensor) -> list[Row]:
    data, rows = bytes(tensor.data), tensor.shape[1]
    digests = [data[at : at + 32] for at in range(0, len(data), 32)]
    return [tuple(digests[at::rows]) for at in range(rows)]


@dataclass
class Relay:
    """A hop with its cache and the steps that it has not computed yet."""

    hop: Hop
    cache: Cache
    steps: collections.deque[Compute] = field(default_factory=collections.deque)
    outputs: list[Row] = field(default_factory=list)
    rows_computed: int = 0
    rows_restored: int = 0


@dataclass
class Wire:
    """What is under way between a sender and a receiver."""

    sender: str
    receiver: str
    forward: collections.deque[Step] = field(default_factory=collections.deque)
    back: collections.deque[Resume] = field(default_factory=collections.deque)


class RingWorld:
    """A session, its chain, its relays, and the wires between them; and others after it."""

    def __init__(self, spans: list[Span], batch: int = 1) -> None:
        self.now = 0.0
        self.batch = batch
        self.stores: dict[str, dict[bytes, Kept]] = collections.defaultdict(dict)
        """By peer id and storage key."""
        self._names = 0
        self._start()
        self.route(spans)

    def again(self, spans: list[Span], count: int, want: int, branch: int = 0) -> None:
        """Another session, whose first tokens are known when its route is."""
        self.close()
        self._start()
        self.append(count, want, branch)
        self.route(spans)

    def _start(self) -> None:
        self.tokens: list[tuple[int, ...]] = []
        self.relays: dict[str, Relay] = {}
        self.wires: dict[str, Wire] = {}
        """By sender."""
        self.given_up: set[str] = set()
        """Senders that do not dial their successor any more until they are told to."""
        self.delivered: dict[int, Row] = {}
        self._dead: set[str] = set()
        terms = SessionTerms(
            session=bytes(16),
            model="f" * 64,
            span=Span(0, NUM_BLOCKS),
            hidden_size=HIDDEN_SIZE,
            batch=self.batch,
            padding=(0,) * self.batch,
            max_tokens=MAX_TOKENS,
            wire_dtype=DType.FLOAT32,
        )
        self.chain = Chain(terms, own_peer_id=ME, now=self.now)

    # --- the originator ---------------------------------------------------------------------

    def route(self, spans: list[Span], name: str | None = None) -> None:
        """Fill the chain's missing blocks with new relays, or with one of that name."""
        hops = [ChainHop(Peer(name or self._name(span)), span) for span in spans]
        inputs = HashedInputs(HIDDEN_SIZE, DType.FLOAT32)
        if self.batch == 1:
            inputs.take(
                0,
                len(self.tokens),
                b"".join(digest for row in self.tokens for digest in embed(row)),
            )
        self._apply(self.chain.receive(Routed(hops, inputs.digests), self.now))
        self._all_ready()

    def _name(self, span: Span) -> str:
        """The same peers serve the same blocks in every session, unless they have died in it."""
        for variant in "ab":
            name = f"{span}{variant}"
            if name not in self._dead and name not in self.relays:
                return name
        self._names += 1
        return f"hop{self._names}"

    def lose(self, peer_id: str) -> None:
        """A hop dies with all that it holds of this session and all that is under way."""
        self._dead.add(peer_id)
        self._apply(self.chain.receive(HopLost(peer_id, "died"), self.now))

    def reopen(self, peer_id: str) -> None:
        """A hop is lost, whoever linked to it gives it up, and it takes its own place again."""
        span = self.relays[peer_id].hop.opened.span
        senders = [wire.sender for wire in self.wires.values() if wire.receiver == peer_id]
        self.lose(peer_id)
        self.given_up.update(senders)
        self.route([span], peer_id)

    def cut_control(self, peer_id: str) -> None:
        """The originator's stream to a hop breaks, and what the hop was sending on it is lost."""
        hop = self.relays[peer_id].hop
        if hop.successor is None:
            hop.next_outgoing(2)
        self._reconnect(HopCut(peer_id, "reset"))

    def restart(self, peer_id: str) -> None:
        """A hop comes back under its name, with nothing of what it held."""
        del self.relays[peer_id]
        self.wires.pop(peer_id, None)
        for wire in list(self.wires.values()):
            if wire.receiver == peer_id:
                self.cut(wire.sender)
        self._reconnect(HopCut(peer_id, "reset"))

    def cut_own_link(self) -> None:
        """The originator's link to the first hop breaks; old steps may still arrive later."""
        self._reconnect(LinkCut("reset"))

    def cut_beside_a_gap(self, dead: str, cut: set[str], passes: int) -> None:
        """Streams break while a lost hop has not been replaced yet, and the others go on."""
        self.lose(dead)
        for peer_id in sorted(cut - {dead}):
            self._apply(self.chain.receive(HopCut(peer_id, "reset"), self.now))
        self._apply(self.chain.receive(LinkCut("reset"), self.now))
        for _ in range(passes):
            self.advance(3)
        self.route(self.chain.missing)

    def _reconnect(self, event: HopCut | LinkCut) -> None:
        self._apply(self.chain.receive(event, self.now))
        if missing := self.chain.missing:  # it has happened too often
            self.route(missing)
        self._all_ready()

    def _all_ready(self) -> None:
        for hop in self.chain.hops:
            self._apply(self.chain.receive(HopReady(hop.peer.peer_id), self.now))

    def append(self, count: int, want: int, branch: int = 0) -> None:
        """The text goes on; on the same branch with the same tokens as in any other session."""
        start = len(self.tokens)
        self.tokens += [
            tuple(10_000 * lane + 1000 * branch + start + index for lane in range(self.batch))
            for index in range(count)
        ]
        self.now += 1
        self.chain.append(count, want_from=len(self.tokens) - want, now=self.now)

    def rewind(self, position: int, order: tuple[int, ...] = ()) -> None:
        self.chain.rewind(position, order)
        self.tokens = reordered(self.tokens[:position], order)
        kept = [at for at in self.delivered if at < position]
        rows = reordered([self.delivered[at] for at in kept], order)
        self.delivered = dict(zip(kept, rows, strict=True))

    def close(self) -> None:
        self._apply(self.chain.receive(Closed("done"), self.now))

    def _apply(self, effects: list[ChainEffect]) -> None:
        for effect in effects:
            if isinstance(effect, OpenHop):
                self._open(effect.peer.peer_id, effect.frame)
            elif isinstance(effect, RelinkHop):
                self._tell(effect.peer_id, effect.frame)
            elif isinstance(effect, DropHop):
                self.relays.pop(effect.peer_id, None)  # a restarted one is gone already
                self.wires.pop(effect.peer_id, None)
                for wire in list(self.wires.values()):
                    if wire.receiver == effect.peer_id:
                        self.cut(wire.sender)
            elif isinstance(effect, LinkFirst):
                self.wires[ME] = Wire(ME, effect.peer.peer_id)
                self._link(ME, effect.epoch)
            elif isinstance(effect, Deliver):
                rows = to_rows(effect.hidden)
                for at, row in enumerate(rows, start=self.chain.expected - len(rows)):
                    self.delivered[at] = row

    def _open(self, peer_id: str, opened: Open) -> None:
        held = self.relays.get(peer_id)
        if held is not None and same_session(held.hop.opened, opened):
            self._tell(peer_id, Reopened(opened))
            return
        cache, outputs = Cache(opened.span), list[Row]()
        for key in reversed(offered_keys(opened)):
            if (kept := self.stores[peer_id].get(key)) is not None:
                cache.states = [list(states) for states in kept.states]
                outputs = list(kept.outputs)
                break
        hop = Hop(
            opened,
            hidden_size=HIDDEN_SIZE,
            now=self.now,
            restored=to_tensor(outputs) if outputs else None,
        )
        relay = Relay(hop, cache, outputs=outputs, rows_restored=len(outputs))
        self.relays[peer_id] = relay
        if opened.successor is not None:
            self.wires[peer_id] = Wire(peer_id, opened.successor.peer_id)

    # --- the relays -------------------------------------------------------------------------

    def _tell(self, peer_id: str, event: HopEvent) -> list[Resume]:
        """Give a relay an event; returns what it answers to whoever links to it."""
        relay = self.relays[peer_id]
        answers: list[Resume] = []
        for effect in relay.hop.receive(event, self.now):
            if isinstance(effect, Compute):
                relay.steps.append(effect)
            elif isinstance(effect, Reply):
                assert isinstance(effect.frame, Resume)
                answers.append(effect.frame)
            elif isinstance(effect, DialSuccessor):
                self.given_up.discard(peer_id)
                self.wires.pop(peer_id, None)
                if relay.hop.successor is not None:
                    self.wires[peer_id] = Wire(peer_id, relay.hop.successor.peer_id)
        return answers

    def compute(self, peer_id: str) -> bool:
        relay = self.relays[peer_id]
        if not relay.steps:
            return False
        compute = relay.steps.popleft()
        step, rows = compute.step, to_rows(compute.step.hidden)
        relay.rows_computed += len(rows)
        output = relay.cache.run(step.position, rows, step.order)
        relay.outputs = relay.outputs[: step.position] + output
        for position, key in compute.labels:
            states = [states[:position] for states in relay.cache.states]
            kept = Kept(states, relay.outputs[:position])
            assert self.stores[peer_id].setdefault(key, kept) == kept, "two things, one label"
        self._tell(peer_id, Computed(step, to_tensor(output), compute.labels))
        return True

    # --- the wires --------------------------------------------------------------------------

    def _link(self, sender: str, epoch: int) -> bool:
        wire = self.wires[sender]
        relay = self.relays.get(wire.receiver)
        if relay is None or relay.hop.link_welcome(sender, epoch) is not Welcome.ACCEPT:
            return False
        wire.back.extend(self._tell(wire.receiver, Linked()))
        return True

    def dial(self, sender: str) -> bool:
        """A relay links to its successor, if it has no link."""
        relay = self.relays.get(sender)
        if relay is None or relay.hop.successor_linked or sender not in self.wires:
            return False
        if sender in self.given_up:
            return False
        return not self.wires[sender].back and self._link(sender, relay.hop.epoch)

    def cut(self, sender: str) -> None:
        """The link breaks; old steps may still arrive later, the sender does not know how far."""
        if sender == ME:
            return  # see ``cut_own_link``
        wire = self.wires[sender]
        wire.back.clear()
        self._tell(sender, SuccessorLost())

    def transmit(self, sender: str, max_rows: int) -> bool:
        """The sender puts its next step, if there is one, on the wire."""
        wire = self.wires[sender]
        if sender != ME:
            outgoing = self.relays[sender].hop.next_outgoing(max_rows)
            assert not isinstance(outgoing, Output)
            if outgoing is not None:
                wire.forward.append(outgoing)
            return outgoing is not None
        due = self.chain.next_due(max_rows)
        if due is None:
            return False
        hidden = to_tensor([embed(token) for token in self.tokens[due.start : due.stop]])
        wire.forward.append(
            Step(
                due.link,
                due.sequence,
                due.rewind,
                due.start,
                self.chain.expected,
                hidden,
                past=due.past,
            )
        )
        return True

    def deliver(self, sender: str) -> bool:
        """The first step on the wire arrives."""
        wire = self.wires[sender]
        if not wire.forward or wire.receiver not in self.relays:
            wire.forward.clear()
            return False
        wire.back.extend(self._tell(wire.receiver, wire.forward.popleft()))
        return True

    def answer(self, sender: str) -> bool:
        """The receiver's first grant under way arrives at the sender."""
        wire = self.wires[sender]
        if not wire.back:
            return False
        grant = wire.back.popleft()
        if sender == ME:
            self._apply(self.chain.receive(grant, self.now))
        else:
            self._tell(sender, grant)
        return True

    def send_back(self) -> bool:
        """The last hop returns rows to the originator (on a stream that is reliable)."""
        if not self.chain.hops:
            return False
        last = self.chain.hops[-1].peer.peer_id
        hop = self.relays[last].hop
        output = hop.next_outgoing(3) if hop.successor is None else None
        if output is None:
            return False
        assert isinstance(output, Output)
        self._apply(self.chain.receive(Returned(last, output), self.now))
        return True

    def advance(self, max_rows: int) -> None:
        """Everything moves by one; a busy wire has a step under way afterwards."""
        for peer_id in list(self.relays):
            self.compute(peer_id)
        for sender in list(self.wires):
            self.deliver(sender)
            if not self.answer(sender):
                self.dial(sender)
            self.transmit(sender, max_rows)

    def settle(self) -> None:
        """Let everything that is under way arrive, reliably, until nothing moves."""
        moving = True
        while moving:
            moving = self.send_back()
            for peer_id in list(self.relays):
                moving |= self.compute(peer_id)
            for sender in list(self.wires):
                moving |= self.answer(sender) or self.dial(sender)
                moving |= self.transmit(sender, 4)
                moving |= self.deliver(sender)
