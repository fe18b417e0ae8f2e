"""The relaying side of a session: what one hop does with links, steps and its own outputs.

Rules of this file:

* Rows go in through one link (``LinkReceiver``), are computed in the order in which they were
  taken, and land in the output log; from there they go to the successor through the next link
  (``LinkSender``) or, at the last hop, to the originator as far as it wants them.
* The shell pulls: ``next_outgoing`` says what to send when the stream can take it, so a slow
  successor backs up into the log, which ``max_tokens`` bounds, and not into a queue.
* Rewinds, and the orders that they bring, take effect when their first step has been computed, in
  order with everything else.
* Only the predecessor that the originator named may link, and only from the epoch on in which it
  was named.
* A hop outlives its control stream for a while: an originator that comes back in time with a newer
  epoch (``Reopened``) finds everything as it was, and only outputs are sent again.
* A hop that was offered a prefix and holds it begins behind it. What it can say of where its rows
  come from it says to the engine (``Compute.labels``) and, of rows computed, to its successor
  (``Step.vouched``); ``prefix.py`` has the theory.

``receive`` takes an event and the time and returns effects; nothing here waits or does I/O.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, ClassVar

from .checks import Peer
from .errors import ErrorCode, RemoteProtocolError
from .frames import Open, Output, Probe, Relink, Resume, State, Step
from .link import LinkReceiver, LinkSender, Verdict
from .log import OutputLog, RewindHistory, fits
from .prefix import (
    HashedInputs,
    Label,
    VouchedInputs,
    boundaries,
    named_boundaries,
    output_digest,
    storage_keys,
    vouched_from,
)
from .tensor import WireTensor

IDLE_TIMEOUT = 600.0
"""Seconds after which a session that nobody has used is dropped: long enough for a person who
thinks between two turns of a chat, and its originator can replay it from tokens later."""


# --- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Linked:
    """The predecessor's link was let in (see ``link_welcome``)."""


@dataclass(frozen=True, slots=True)
class Computed:
    """The rows of a ``Compute`` effect are done."""

    step: Step
    hidden: WireTensor
    labels: tuple[Label, ...] = ()
    """Those of the effect."""


@dataclass(frozen=True, slots=True)
class SuccessorLost:
    """The link to the successor broke; it may be linked again."""


@dataclass(frozen=True, slots=True)
class Reopened:
    """The originator lost its control stream and has opened the same session again on another."""

    opened: Open


Event = Linked | Step | Computed | Resume | SuccessorLost | Relink | Reopened | Probe


# --- effects --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """Send the frame back on the stream that the event came from."""

    frame: Resume | State


@dataclass(frozen=True, slots=True)
class Compute:
    """Run the span over the step's rows at its position, then say ``Computed``.

    Cached rows at the step's position and behind it are void; those before it are put in
    ``step.order`` first.
    """

    step: Step
    labels: tuple[Label, ...] = ()
    """Storage keys of the boundaries that the step reaches, once it has been computed."""


@dataclass(frozen=True, slots=True)
class DialSuccessor:
    """The successor is somebody else now: drop the old link and open one to ``hop.successor``."""


Effect = Reply | Compute | DialSuccessor


class Welcome(Enum):
    """What to do with a peer that wants to link."""

    ACCEPT = auto()
    WAIT = auto()
    """It knows a newer epoch than we do; the originator's relink is on its way."""
    REFUSE = auto()


class Hop:
    """One session at one hop."""

    def __init__(
        self, opened: Open, *, hidden_size: int, now: float, restored: WireTensor | None = None
    ) -> None:
        """``restored``: outputs [1, rows, hidden_size] of the rows that are held already.

        They belong to one of ``offered_keys(opened)``, whose last row they end with.
        """
        self.opened = opened
        self.epoch = opened.epoch
        self.predecessor = opened.predecessor
        self.successor: Peer | None = opened.successor
        self._predecessor_since = opened.epoch
        self._hidden_size = hidden_size
        self._history = RewindHistory()
        self._log = OutputLog(opened.batch, hidden_size, opened.wire_dtype)
        if restored is not None:
            self._log.append(restored)
        held = self._log.end
        self._receiver = LinkReceiver(held)
        self._sender = LinkSender(self._history)
        known = opened.prefix[: named_boundaries(held)]
        self._inputs: HashedInputs | VouchedInputs = (
            HashedInputs(hidden_size, opened.wire_dtype, known)
            if opened.span.start == 0
            else VouchedInputs(known)
        )
        self._keys = list(offered_keys(opened)[: len(known)])
        """The storage keys of what was taken in."""
        self._outputs = [output_digest(key, opened.span) for key in self._keys]
        """The output digests of what is in the log."""
        self._want_from = held
        self._returned = 0
        self._last_heard = now

    def __repr__(self) -> str:
        return (
            f"Hop(epoch={self.epoch}, predecessor={self.predecessor!r}, "
            f"successor={self.successor}, {self._receiver}, {self._log}, {self._sender})"
        )

    @property
    def position(self) -> int:
        """Rows taken in."""
        return self._receiver.position

    @property
    def produced(self) -> int:
        """Rows computed."""
        return self._log.end

    @property
    def successor_linked(self) -> bool:
        """Whether the successor has said where to start."""
        return self._sender.linked

    def link_welcome(self, peer_id: str, epoch: int) -> Welcome:
        """Whether ``peer_id``, who speaks of ``epoch``, may link to us."""
        if peer_id == self.predecessor and epoch >= self._predecessor_since:
            return Welcome.ACCEPT
        return Welcome.WAIT if epoch > self.epoch else Welcome.REFUSE

    def receive(self, event: Event, now: float) -> list[Effect]:
        """Take an event at ``now`` (seconds). Raises RemoteProtocolError for a peer's fault."""
        self._last_heard = now
        return self._ON[type(event)](self, event)

    def next_deadline(self) -> float:
        """When the session is to be dropped if nothing is heard before."""
        return self._last_heard + IDLE_TIMEOUT

    def next_outgoing(self, max_rows: int) -> Step | Output | None:
        """What to send now, to the successor or, when there is none, to the originator."""
        if self.successor is None:
            return self._next_output(max_rows)
        due = self._sender.next(self._log.end, max_rows)
        if due is None:
            return None
        return Step(
            link=due.link,
            sequence=due.sequence,
            rewind=due.rewind,
            position=due.start,
            want_from=self._want_from,
            hidden=self._log.read(due.start, due.stop),
            vouched=vouched_from(due.start, due.stop, self._outputs),
            past=due.past,
        )

    def _next_output(self, max_rows: int) -> Output | None:
        start = max(self._returned, self._want_from)
        stop = min(self._log.end, start + max_rows)
        if start >= stop:
            return None
        self._returned = stop
        return Output(self._history.current, start, self._log.read(start, stop))

    def _linked(self, _event: Linked) -> list[Effect]:
        if isinstance(self._inputs, VouchedInputs):
            self._inputs.linked()
        return [Reply(self._receiver.linked())]

    def _step(self, step: Step) -> list[Effect]:
        opened = self.opened
        batch, rows, hidden_size = (*step.hidden.shape, 0, 0)[:3]
        expected = (opened.batch, self._hidden_size, opened.wire_dtype)
        if len(step.hidden.shape) != 3 or (batch, hidden_size, step.hidden.dtype) != expected:
            raise RemoteProtocolError(
                f"hidden states must be {opened.wire_dtype} "
                f"[{opened.batch}, rows, {self._hidden_size}], "
                f"got {step.hidden.dtype} {list(step.hidden.shape)}"
            )
        if step.position + rows > opened.max_tokens:
            raise RemoteProtocolError(
                f"rows up to position {step.position + rows} in a session of "
                f"{opened.max_tokens} tokens"
            )
        for later in step.past:
            if later.order and not fits(later.order, opened.padding):
                raise RemoteProtocolError(
                    f"sequences {list(later.order)} cannot take the places of a batch with "
                    f"padding {list(opened.padding)}"
                )
        verdict = self._receiver.take(step)
        if verdict is Verdict.ACCEPT:
            return [Compute(step, self._label(step))]
        return [Reply(self._receiver.grant())] if verdict is Verdict.GAP else []

    def _label(self, step: Step) -> tuple[Label, ...]:
        """The storage keys that can be said of the rows up to the end of an accepted step."""
        if not shares_prefixes(self.opened):
            return ()
        rows, inputs = step.hidden.shape[1], self._inputs
        if isinstance(inputs, VouchedInputs):
            inputs.take(step.position, rows, step.vouched)
        else:
            inputs.take(step.position, rows, step.hidden.data)
        before = named_boundaries(step.position)
        del self._keys[before:]
        new = _keys(self.opened, inputs.digests[before:], *self._keys[-1:])
        self._keys += new
        return tuple(zip(boundaries(step.position, step.position + rows), new, strict=False))

    def _computed(self, event: Computed) -> list[Effect]:
        step = event.step
        if step.rewind > self._history.current:
            self._history.adopt(step.rewind, step.position, step.past)
            self._log.truncate(step.position)
            self._log.reorder(step.order)
            self._returned = 0  # outputs under way are of an older rewind: dropped on arrival
        self._log.append(event.hidden)
        # Only now: a step that is still in the queue may have rewound what the log has.
        del self._outputs[named_boundaries(step.position) :]
        self._outputs += [output_digest(key, self.opened.span) for _, key in event.labels]
        self._want_from = step.want_from
        return []

    def _resumed(self, grant: Resume) -> list[Effect]:
        self._sender.resumed(grant)
        return []

    def _successor_lost(self, _event: SuccessorLost) -> list[Effect]:
        self._sender.lost()
        return []

    def _relinked(self, relink: Relink) -> list[Effect]:
        if relink.epoch <= self.epoch:
            return []
        self.epoch = relink.epoch
        if relink.predecessor != self.predecessor:
            self.predecessor = relink.predecessor
            self._predecessor_since = relink.epoch
            self._receiver.grant()  # whatever the old predecessor has under way is stale
            if isinstance(self._inputs, VouchedInputs):
                self._inputs.sever()
        if relink.successor == self.successor and (relink.successor is None or self._sender.linked):
            return []  # else the same peer is opened anew, and the shell may have given it up
        self.successor = relink.successor
        self._sender.lost()
        self._returned = 0
        return [DialSuccessor()]

    def _reopened(self, event: Reopened) -> list[Effect]:
        opened = event.opened
        effects = self._relinked(Relink(opened.epoch, opened.predecessor, opened.successor))
        self._returned = 0  # outputs may have been lost with the old stream
        return effects

    def _probed(self, probe: Probe) -> list[Effect]:
        return [
            Reply(
                State(
                    nonce=probe.nonce,
                    position=self.position,
                    rewind=self._receiver.rewind,
                    produced=self.produced,
                    produced_rewind=self._history.current,
                    successor_linked=self.successor_linked,
                )
            )
        ]

    _ON: ClassVar[Mapping[type, Callable[["Hop", Any], list[Effect]]]] = {
        Linked: _linked,
        Step: _step,
        Computed: _computed,
        Resume: _resumed,
        SuccessorLost: _successor_lost,
        Relink: _relinked,
        Reopened: _reopened,
        Probe: _probed,
    }


def same_session(held: Open, opened: Open) -> bool:
    """Whether ``opened`` asks for what is held already, but for its place in the ring."""
    return held == replace(
        opened,
        epoch=held.epoch,
        predecessor=held.predecessor,
        successor=held.successor,
        prefix=held.prefix,
    )


def shares_prefixes(opened: Open) -> bool:
    """Whether the session's rows can be told apart by position alone: one sequence, no padding."""
    return opened.batch == 1 and opened.padding == (0,)


def offered_keys(opened: Open) -> tuple[bytes, ...]:
    """The storage keys of the first 32, 64, … positions, as far as the originator has offered."""
    return tuple(_keys(opened, opened.prefix))


def _keys(opened: Open, entries: Iterable[bytes], before: bytes = b"") -> list[bytes]:
    first = opened.span.start == 0
    return storage_keys(
        entries,
        predecessor=None if first else opened.predecessor,
        span=opened.span,
        wire_dtype=opened.wire_dtype,
        before=before,
    )


def check_open(opened: Open, *, model: str, span_served: Any, max_rows: int) -> None:
    """Raise ``Refusal`` if a hop that serves ``span_served`` of ``model`` cannot take part."""
    if opened.model != model:
        raise Refusal(
            ErrorCode.WRONG_MODEL,
            f"this node serves model {model[:12]}…, not {opened.model[:12]}…",
        )
    if not span_served.covers(opened.span):
        raise Refusal(
            ErrorCode.WRONG_SPAN, f"this node serves blocks {span_served}, not {opened.span}"
        )
    if len(opened.padding) != opened.batch or max(opened.padding) >= opened.max_tokens:
        raise Refusal(
            ErrorCode.BAD_REQUEST,
            f"a batch of {opened.batch} needs as many paddings, each below max_tokens",
        )
    offered, fitting = len(opened.prefix), named_boundaries(opened.max_tokens - 1)
    if offered > (fitting if shares_prefixes(opened) else 0):
        raise Refusal(
            ErrorCode.BAD_REQUEST,
            "a prefix may be offered for one sequence without padding that has room for more",
        )
    if max_rows < 1:
        raise Refusal(
            ErrorCode.BAD_REQUEST, f"one row of a batch of {opened.batch} does not fit a frame"
        )


class Refusal(RemoteProtocolError):
    """An ``open`` or ``link`` that will not be served, with the code that says so."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
