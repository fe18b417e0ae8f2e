"""The originating side of a session: the ring's hops, and what goes around it.

Rules of this file:

* The chain's hops are in the order of their spans. Blocks of the session's span (a model's, or a part
  of them) that no hop of the chain covers are ``missing``; the shell plans a route for them and says ``Routed``. A session starts with all of
  its blocks missing, and a lost hop makes its blocks missing again: opening, recovering and
  migrating are one mechanism.
* Every re-route raises the epoch. New hops are opened in it; of the old ones those whose neighbours
  changed are relinked. Links then resume by position, so nothing is computed twice that a
  surviving hop holds, and no hidden state passes through the originator.
* A hop whose control stream breaks may live: it is opened again at the same peer, in a new epoch, and
  what it holds it still holds. Only when that fails, or breaks again before anything has come back,
  it is lost. The link to the first hop is dialled again likewise.
* Nobody is told of neighbours but in a whole chain: across a gap, who is next is not who comes next.
* Who is silent, stuck or slow is for ``watch.py`` to say.
* The originator's own log is the tokens: ``length`` of them; the shell embeds what ``next_due``
  says. Its link to the first hop is a link like any other.
* A new hop is offered the prefix of the session that it may hold from another one, as far as the
  shell knows what enters the chain (``Routed.entries``) and while nothing was ever rewound: what a
  hop restores is of no rewind. What is offered follows from the whole route up to the hop.
* ``expected`` is the next row that the originator wants back. Rows below it are duplicates, rows of
  an older rewind are stale.

``receive`` takes an event and the time and returns effects; nothing here waits or does I/O.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, ClassVar

from .checks import Peer
from .errors import LocalProtocolError, RemoteProtocolError
from .frames import Open, Output, Relink, Resume, State
from .link import Due, LinkSender
from .log import OutputLog, RewindHistory, fits
from .prefix import last_boundary, named_boundaries, offers
from .span import Span, gaps
from .tensor import DType, WireTensor
from .watch import Pace, Target, Watch

MAX_CUTS = 3
"""How often in a row, with nothing coming back in between, a stream to the same hop may break."""


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """What does not change over a session's life."""

    session: bytes
    model: str
    span: Span
    """The blocks that rows go through."""
    hidden_size: int
    batch: int
    padding: tuple[int, ...]
    max_tokens: int
    wire_dtype: DType


class ChainState(StrEnum):
    """Where a session is, as far as its route goes."""

    ROUTING = "routing"
    """Some blocks have no hop."""
    OPENING = "opening"
    """Hops have been asked and not all have said ready."""
    RUNNING = "running"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class ChainHop:
    """A hop of the chain."""

    peer: Peer
    span: Span
    ready: bool = False
    unopened: bool = True
    """Whether it has to be opened, for the first time or again, when the chain is whole."""
    pace: Pace = field(default_factory=Pace)
    """What it has announced of its speed, the way to it included."""


# --- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Routed:
    """The shell has planned hops for all of ``chain.missing``."""

    hops: Sequence[ChainHop]
    entries: Sequence[bytes] = ()
    """Entry digests of the first 32, 64, … of the session's positions (``prefix.py``), up to
    ``chain.offerable``; fewer or none offer less."""


@dataclass(frozen=True, slots=True)
class HopReady:
    """A hop has answered ``ready``."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class HopLost:
    """A hop has refused, failed, or cannot be reached any more."""

    peer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class HopCut:
    """The control stream to a hop broke, without a word that says why."""

    peer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class LinkCut:
    """Our link to the first hop broke, without a word that says why."""

    reason: str


@dataclass(frozen=True, slots=True)
class HopState:
    """A hop has answered a probe."""

    peer_id: str
    state: State


@dataclass(frozen=True, slots=True)
class Returned:
    """Rows have come back."""

    peer_id: str
    output: Output


@dataclass(frozen=True, slots=True)
class Ticked:
    """``next_deadline`` has passed."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The session is over."""

    reason: str


Event = (
    Routed | HopReady | HopLost | HopCut | LinkCut | HopState | Returned | Resume | Ticked | Closed
)


# --- effects --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenHop:
    """Open a stream to the peer, in place of one that may be there, and send the frame."""

    peer: Peer
    frame: Open


@dataclass(frozen=True, slots=True)
class RelinkHop:
    """Send the frame on the stream to the hop."""

    peer_id: str
    frame: Relink


@dataclass(frozen=True, slots=True)
class ProbeHop:
    """Ask the hop whether it lives."""

    peer_id: str
    nonce: int


@dataclass(frozen=True, slots=True)
class DropHop:
    """Close the stream to the hop; it is not part of the chain any more."""

    peer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class LinkFirst:
    """Drop the link to the old first hop, if any, and open one to this peer."""

    peer: Peer
    epoch: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """Rows that the originator wants, in order: [batch, rows, hidden_size]."""

    hidden: WireTensor


Effect = OpenHop | RelinkHop | ProbeHop | DropHop | LinkFirst | Deliver


class Chain:
    """One session at its originator."""

    def __init__(self, terms: SessionTerms, *, own_peer_id: str, now: float) -> None:
        self.terms = terms
        self.epoch = 0
        self.hops: tuple[ChainHop, ...] = ()
        self.length = 0
        self.expected = 0
        self.recoveries = 0
        """How often other hops had to be found."""
        self.reconnects = 0
        """How often a stream to a hop that was kept had to be opened again."""
        self._own_peer_id = own_peer_id
        self._closed = False
        self._history = RewindHistory()
        self._sender = LinkSender(self._history)
        self._watch = Watch(now)
        self._cuts: Counter[str] = Counter()

    def __repr__(self) -> str:
        hops = ", ".join(f"{hop.peer.peer_id}[{hop.span}]" for hop in self.hops)
        return (
            f"Chain({self.state}, epoch={self.epoch}, hops=[{hops}], length={self.length}, "
            f"expected={self.expected}, {self._sender})"
        )

    @property
    def state(self) -> ChainState:
        """Where the session is."""
        if self._closed:
            return ChainState.CLOSED
        if self.missing:
            return ChainState.ROUTING
        ready = all(hop.ready for hop in self.hops)
        return ChainState.RUNNING if ready else ChainState.OPENING

    @property
    def missing(self) -> list[Span]:
        """The blocks without a hop, as maximal runs; a closed session misses none."""
        before = [Span(0, self.terms.span.start)] if self.terms.span.start else []
        spans = [*before, *(hop.span for hop in self.hops)]
        return [] if self._closed else gaps(spans, self.terms.span.end)

    @property
    def sent(self) -> int:
        """Positions that were sent to the first hop, of ``length``."""
        return self._sender.sent

    @property
    def offerable(self) -> int:
        """Positions, up to a boundary, that a new hop might have from another session.

        At least one row is left, so that there is something to come back.
        """
        terms = self.terms
        if self._history.current or terms.batch > 1 or any(terms.padding) or terms.span.start:
            return 0
        return last_boundary(self.length)

    def append(self, tokens: int, *, want_from: int, now: float) -> None:
        """The log has ``tokens`` more positions; rows from ``want_from`` on are to come back."""
        if self.length + tokens > self.terms.max_tokens:
            raise LocalProtocolError(
                f"{self.length + tokens} tokens in a session of {self.terms.max_tokens}"
            )
        if not self.expected <= want_from < self.length + tokens:
            raise LocalProtocolError(
                f"rows from {want_from} are not among {self.expected}..{self.length + tokens}"
            )
        self.length += tokens
        self.expected = want_from
        self._watch.sent(tokens, now)

    def rewind(self, position: int, order: tuple[int, ...] = ()) -> None:
        """Go back: the log ends at ``position`` from now on, and its sequences are in ``order``.

        Sequence b goes on from what ``order[b]`` was so far, which has as much padding. Rows that
        have not come back yet are not awaited any more, not even those before ``position``.
        """
        if not 0 <= position < self.length + bool(order):
            raise LocalProtocolError(f"cannot go back to {position} in 0..{self.length}")
        padding = self.terms.padding
        if order and not fits(order, padding):
            raise LocalProtocolError(
                f"sequences {list(order)} cannot take the places of a batch with padding "
                f"{list(padding)}"
            )
        self._history.record(self._history.current + 1, position, order)
        self.length = self.expected = position

    def next_due(self, max_rows: int) -> Due | None:
        """Which tokens to embed and send to the first hop now, as one step."""
        return self._sender.next(self.length, max_rows)

    def receive(self, event: Event, now: float) -> list[Effect]:
        """Take an event at ``now`` (seconds). Raises RemoteProtocolError for a peer's fault."""
        if self._closed:
            return []
        return self._ON[type(event)](self, event, now)

    def next_deadline(self) -> float | None:
        """When to say ``Ticked``; None while nothing is awaited from a whole ring."""
        if self.expected >= self.length or self.state is not ChainState.RUNNING:
            return None
        return self._watch.deadline()

    # --- the route --------------------------------------------------------------------------------

    def _routed(self, event: Routed, now: float) -> list[Effect]:
        hops = sorted([*self.hops, *event.hops], key=lambda hop: hop.span)
        ends = [self.terms.span.start, *(hop.span.end for hop in hops)]
        starts = [*(hop.span.start for hop in hops), self.terms.span.end]
        peers = {hop.peer.peer_id for hop in hops}
        if ends != starts or len(peers) != len(hops):
            raise LocalProtocolError(
                f"hops {[str(hop.span) for hop in hops]} do not form a chain of blocks "
                f"{self.terms.span} over different peers"
            )
        before = self._neighbours()
        self.recoveries += 1 if self.epoch else 0
        self.hops = tuple(hops)
        self._watch.announced(sum((hop.pace for hop in hops), Pace()))
        self._watch.rerouted(self.length, now)
        offered = offers(
            event.entries[: named_boundaries(self.offerable)],
            [(hop.peer.peer_id, hop.span) for hop in hops],
            self.terms.wire_dtype,
        )
        prefixes = {
            hop.peer.peer_id: prefix
            for hop, prefix in zip(hops, offered, strict=True)
            if hop in event.hops
        }
        effects = self._connect(before, prefixes)
        if hops[0] in event.hops and not offered[0]:
            self._sender.assume_fresh()
        return effects

    def _connect(
        self,
        before: Mapping[str, tuple[str, Peer | None]],
        prefixes: Mapping[str, tuple[bytes, ...]] = MappingProxyType({}),
    ) -> list[Effect]:
        """Open what is to be opened, in a new epoch, and relink whoever has other neighbours.

        ``before``: the neighbours until now. ``prefixes``: what new hops are offered. Whoever
        precedes a hop that is opened is relinked, too: had that one restarted, it would not let a
        link of an older epoch in.
        """
        self.epoch += 1
        opened = {hop.peer.peer_id for hop in self.hops if hop.unopened}
        after = self._neighbours()
        effects: list[Effect] = []
        for hop in self.hops:
            peer_id = hop.peer.peer_id
            predecessor, successor = after[peer_id]
            if peer_id in opened:
                prefix = prefixes.get(peer_id, ())
                frame = self._open(hop.span, predecessor, successor, prefix)
                effects.append(OpenHop(hop.peer, frame))
            elif before.get(peer_id) != after[peer_id] or (
                successor is not None and successor.peer_id in opened
            ):
                effects.append(RelinkHop(peer_id, Relink(self.epoch, predecessor, successor)))
        self.hops = tuple(replace(hop, unopened=False) for hop in self.hops)
        if self.hops[0].peer.peer_id in opened:
            effects += self._link_first()
        return effects

    def _neighbours(self) -> dict[str, tuple[str, Peer | None]]:
        """Peer id of each hop -> who links to it and whom it links to, gaps overlooked."""
        ids = [hop.peer.peer_id for hop in self.hops]
        predecessors = [self._own_peer_id, *ids]
        successors: list[Peer | None] = [*(hop.peer for hop in self.hops[1:]), None]
        return dict(zip(ids, zip(predecessors, successors, strict=False), strict=False))

    def _open(
        self, span: Span, predecessor: str, successor: Peer | None, prefix: tuple[bytes, ...]
    ) -> Open:
        terms = self.terms
        return Open(
            session=terms.session,
            epoch=self.epoch,
            model=terms.model,
            span=span,
            predecessor=predecessor,
            successor=successor,
            batch=terms.batch,
            padding=terms.padding,
            max_tokens=terms.max_tokens,
            wire_dtype=terms.wire_dtype,
            prefix=prefix,
        )

    def _ready(self, event: HopReady, now: float) -> list[Effect]:
        self._update(event.peer_id, ready=True)
        self._watch.moved(now)
        return []

    def _update(self, peer_id: str, **changes: Any) -> None:
        self.hops = tuple(
            replace(hop, **changes) if hop.peer.peer_id == peer_id else hop for hop in self.hops
        )

    def _lost(self, event: HopLost, _now: float) -> list[Effect]:
        kept = tuple(hop for hop in self.hops if hop.peer.peer_id != event.peer_id)
        if len(kept) == len(self.hops):
            return []
        self.hops = kept
        return [DropHop(event.peer_id, event.reason)]

    def _cut(self, event: HopCut, now: float) -> list[Effect]:
        peer_id = event.peer_id
        hop = next((hop for hop in self.hops if hop.peer.peer_id == peer_id), None)
        if hop is None:
            return []
        self._cuts[peer_id] += 1
        if not hop.ready or self._cuts[peer_id] > MAX_CUTS:
            return self._lost(HopLost(peer_id, event.reason), now)
        self.reconnects += 1
        self._watch.moved(now)
        self._update(peer_id, ready=False, unopened=True)
        # With a gap in the chain, neighbours are not adjacent: the next route opens it, too.
        return [] if self.missing else self._connect(self._neighbours())

    def _link_first(self) -> list[Effect]:
        self._sender.lost()
        return [LinkFirst(self.hops[0].peer, self.epoch)]

    def _link_cut(self, event: LinkCut, now: float) -> list[Effect]:
        if not self.hops or self.hops[0].span.start > self.terms.span.start:
            return []  # the first hop is lost, and its link with it
        self._cuts[self._own_peer_id] += 1
        if self._cuts[self._own_peer_id] > MAX_CUTS:
            return self._lost(HopLost(self.hops[0].peer.peer_id, event.reason), now)
        return self._link_first()

    # --- the rows ---------------------------------------------------------------------------------

    def _resumed(self, grant: Resume, _now: float) -> list[Effect]:
        self._sender.resumed(grant)
        return []

    def _returned(self, event: Returned, now: float) -> list[Effect]:
        output, terms = event.output, self.terms
        if not self.hops or event.peer_id != self.hops[-1].peer.peer_id:
            return []  # of a hop that was the last one in an older epoch
        if output.rewind < self._history.current:
            return []
        shape, dtype = output.hidden.shape, output.hidden.dtype
        if len(shape) != 3 or (shape[0], shape[2], dtype) != (
            terms.batch,
            terms.hidden_size,
            terms.wire_dtype,
        ):
            raise RemoteProtocolError(
                f"outputs must be {terms.wire_dtype} [{terms.batch}, rows, {terms.hidden_size}], "
                f"got {dtype} {list(shape)}"
            )
        end = output.position + shape[1]
        if output.rewind > self._history.current or end > self.length:
            raise RemoteProtocolError(f"outputs up to {end} of {self.length} tokens sent")
        if end <= self.expected:
            return []
        if output.position > self.expected:
            raise RemoteProtocolError(
                f"outputs at {output.position} where {self.expected} comes next"
            )
        hidden = output.hidden
        if output.position < self.expected:
            # A last hop that replaces another cuts its rows into outputs as it likes.
            wanted = OutputLog(terms.batch, terms.hidden_size, terms.wire_dtype)
            wanted.append(hidden)
            hidden = wanted.read(self.expected - output.position, shape[1])
        self.expected = end
        self._watch.returned(now, everything=end == self.length)
        self._cuts.clear()
        return [Deliver(hidden)]

    # --- who lives --------------------------------------------------------------------------------

    def _ticked(self, _event: Ticked, now: float) -> list[Effect]:
        deadline = self.next_deadline()
        if deadline is None or now < deadline:
            return []
        if not self._watch.asking:
            peers = [hop.peer.peer_id for hop in self.hops]
            nonce = self._watch.ask(peers, now)
            return [ProbeHop(peer_id, nonce) for peer_id in peers]
        silent = self._watch.unanswered(now)
        return self._give_up(silent, "did not answer a probe", now)

    def _answered(self, event: HopState, now: float) -> list[Effect]:
        target = Target(self.length, self._history.current)
        stuck = self._watch.answered(event.peer_id, event.state, target, now)
        return self._give_up(stuck, "nothing moves there", now)

    def _give_up(self, peer_ids: Sequence[str], reason: str, now: float) -> list[Effect]:
        return [
            effect for peer_id in peer_ids for effect in self._lost(HopLost(peer_id, reason), now)
        ]

    def _close(self, event: Closed, _now: float) -> list[Effect]:
        effects: list[Effect] = [DropHop(hop.peer.peer_id, event.reason) for hop in self.hops]
        self._closed, self.hops = True, ()
        return effects

    _ON: ClassVar[Mapping[type, Callable[["Chain", Any, float], list[Effect]]]] = {
        Routed: _routed,
        HopReady: _ready,
        HopLost: _lost,
        HopCut: _cut,
        LinkCut: _link_cut,
        HopState: _answered,
        Returned: _returned,
        Resume: _resumed,
        Ticked: _ticked,
        Closed: _close,
    }
