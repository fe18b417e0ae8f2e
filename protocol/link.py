"""Links: how a sender's log reaches a receiver exactly once, in order, whatever the network does.

Rules of this file:

* The receiver numbers its grants. ``Resume(link, position, rewind)`` says what it holds; the
  sender starts there, under that link number, with sequence 0.
* Within a link number, steps count 0, 1, 2, …: an older link number is stale, a lower sequence a
  duplicate, a higher one a gap, which the receiver answers with a new grant. So a step is taken
  only directly behind the one before it, and drops, duplicates, delays and reconnects can cost
  time but never skip a row or compute one from wrong inputs.
* Under one link number the sender's cursor only goes back for a rewind. The first step of a newer
  rewind therefore starts at a position below which everything that the receiver holds is true, once
  the sequences of its batch are in the order that the step tells: it cuts itself there.
* A receiver that nobody has linked to yet holds nothing, unless it was offered a prefix, so grant
  0 at position 0 needs no ``Resume``: a new session's first step rides right behind ``open``.
"""

from dataclasses import dataclass
from enum import Enum, auto

from .checks import Rewind
from .errors import RemoteProtocolError
from .frames import Resume, Step
from .log import RewindHistory


class Verdict(Enum):
    """What a receiver makes of a step."""

    ACCEPT = auto()
    """Next in order: compute it."""
    IGNORE = auto()
    """Stale or a duplicate."""
    GAP = auto()
    """Something before it is missing: grant anew."""


@dataclass(frozen=True, slots=True)
class Due:
    """Rows ``start..stop-1`` of the sender's log are to be sent as one step."""

    link: int
    sequence: int
    rewind: int
    start: int
    stop: int
    past: tuple[Rewind, ...] = ()
    """See ``Step.past``."""


class LinkReceiver:
    """The receiving end: position, rewind, and which step comes next."""

    def __init__(self, position: int = 0) -> None:
        """``position``: rows that it holds before anybody has sent one."""
        self.link = 0
        self.sequence = 0
        self.position = position
        self.rewind = 0
        self._linked = False

    def __repr__(self) -> str:
        return (
            f"LinkReceiver(link={self.link}, sequence={self.sequence}, "
            f"position={self.position}, rewind={self.rewind})"
        )

    def linked(self) -> Resume:
        """A sender has linked: what to answer."""
        if self._linked:
            return self.grant()
        self._linked = True
        return self._resume()

    def grant(self) -> Resume:
        """Let the sender start again from what we hold; everything under way is stale."""
        self.link += 1
        self.sequence = 0
        return self._resume()

    def take(self, step: Step) -> Verdict:
        """Judge ``step`` and, if it is accepted, count it in.

        When an accepted step is of a newer rewind, what was held from ``step.position`` on is void.
        Raises RemoteProtocolError when the sender contradicts itself.
        """
        if step.link != self.link or step.sequence < self.sequence:
            return Verdict.IGNORE
        if step.sequence > self.sequence:
            return Verdict.GAP
        if step.rewind < self.rewind:
            raise RemoteProtocolError(
                f"a step of rewind {step.rewind} in order behind one of rewind {self.rewind}"
            )
        if step.rewind == self.rewind and step.position != self.position:
            raise RemoteProtocolError(
                f"a step at position {step.position} where {self.position} comes next"
            )
        if step.position > self.position:
            raise RemoteProtocolError(
                f"rewind {step.rewind} starts at {step.position}, beyond {self.position}"
            )
        self._check_past(step)
        self.sequence += 1
        self.rewind = step.rewind
        self.position = step.position + step.hidden.shape[1]
        return Verdict.ACCEPT

    def _check_past(self, step: Step) -> None:
        known = self.rewind
        for number, position, _ in step.past:
            if number <= known or position < step.position:
                raise RemoteProtocolError(
                    f"rewind {number} to {position}, told of behind rewind {known} by a step at "
                    f"{step.position}"
                )
            known = number
        if step.past and known != step.rewind:
            raise RemoteProtocolError(
                f"a step of rewind {step.rewind} that tells of rewinds up to {known}"
            )

    def _resume(self) -> Resume:
        return Resume(link=self.link, position=self.position, rewind=self.rewind)


class LinkSender:
    """The sending end: where in its log the receiver is."""

    def __init__(self, history: RewindHistory) -> None:
        self._history = history
        self._granted: Resume | None = None
        self._cursor: int | None = None
        self._told = 0
        """The rewind that the receiver knows, or will when it has what was sent."""
        self._sequence = 0

    def __repr__(self) -> str:
        return f"LinkSender(granted={self._granted}, cursor={self._cursor})"

    @property
    def linked(self) -> bool:
        """Whether the receiver has said where to start."""
        return self._granted is not None

    @property
    def sent(self) -> int:
        """How far into our log we have sent, on this link; 0 before it starts."""
        return self._cursor or 0

    def assume_fresh(self) -> None:
        """The receiver was opened a moment ago and holds nothing: start without its grant."""
        self.resumed(Resume(link=0, position=0, rewind=0))

    def resumed(self, grant: Resume) -> None:
        """The receiver has said what it holds. An old grant, come late, changes nothing."""
        if self._granted is None or grant.link > self._granted.link:
            self._granted, self._cursor, self._sequence = grant, None, 0

    def lost(self) -> None:
        """The link is gone, or leads to somebody else now."""
        self._granted = self._cursor = None

    def next(self, log_end: int, max_rows: int) -> Due | None:
        """What to send now of a log of ``log_end`` rows; None: nothing yet. Counts as sent."""
        if self._granted is None:
            return None
        if self._cursor is None:
            if self._granted.rewind > self._history.current:
                return None  # the receiver knows a rewind that has not reached us yet
            self._cursor, self._told = self._granted.position, self._granted.rewind
        self._cursor = self._history.valid_prefix(self._told, self._cursor)
        if self._cursor >= log_end:
            return None
        due = Due(
            link=self._granted.link,
            sequence=self._sequence,
            rewind=self._history.current,
            start=self._cursor,
            stop=min(log_end, self._cursor + max_rows),
            past=self._history.since(self._told),
        )
        self._cursor, self._sequence = due.stop, self._sequence + 1
        self._told = due.rewind
        return due
