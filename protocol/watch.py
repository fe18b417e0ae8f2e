"""Who is to blame when nothing comes back: deadlines from measured speed, probes, a verdict.

Rules of this file:

* A step has an expected time: what steps took so far, smoothed as TCP smooths its round trips
  (RFC 6298); before there was one, what the hops have announced. Rows of a prompt or of a replay
  are expected likewise.
* When nothing has come for half of three times that, all hops are asked; a hop that does not answer
  in the other half is lost. So a hop that hangs is found within three times the expected time, and
  never before ``LEAST``: a machine may be busy.
* When all answer, the session stands at the first hop that does not hold all that was sent and has
  not computed it, or at the last one, whose outputs do not arrive. Work of any kind shows in that
  hop's state, so one whose state is the same in ``STUCK_ROUNDS`` rounds is stuck; any other is
  slow, and slow is no fault until ``PATIENCE`` times the expected time have passed.
* A hop in front of which two successors were stuck, with nothing returned in between, does not send
  what it says that it sends: it is lost with the second.

Nothing here waits or does I/O; the chain (``chain.py``) asks and acts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .frames import State

LEAST = 2.0
"""Seconds that a hop may be silent, however fast its steps are: machines are shared, garbage is
collected, packets are sent again."""
FACTOR = 3.0
"""Times the expected time after which a hop that does not answer is lost."""
LONGEST_QUIET = 10.0
"""Seconds without anything after which hops are asked in any case: an answer costs nothing, and a
long prompt must not hide a hop that has died."""
LONGEST_ANSWER = 5.0
"""Seconds for an answer in any case; it waits for no computation."""
STUCK_ROUNDS = 3
"""Rounds in which a stuck hop looks the same. Two rounds may fall into one long pass over a block."""
PATIENCE = 10.0
"""Times the expected time after which even a hop at which something moves is given up."""
LEAST_PATIENCE = 60.0
_SMOOTHING = 1 / 8
"""The weight of the newest measurement: RFC 6298's."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What steps take: seconds."""

    step: float = 0.0
    """A single row, once around."""
    row: float = 0.0
    """Each further row of the same step."""

    def __add__(self, other: "Pace") -> "Pace":
        """Of hops behind one another."""
        return Pace(self.step + other.step, self.row + other.row)

    def seconds(self, rows: int) -> float:
        """A step of ``rows`` rows."""
        return self.step + max(0, rows - 1) * self.row


@dataclass(frozen=True, slots=True)
class Target:
    """What every hop has to hold and to have computed before all is back."""

    position: int
    rewind: int

    def reached_by(self, state: State) -> bool:
        """Whether a hop has taken in and computed everything."""
        return self.taken_by(state) and (state.produced, state.produced_rewind) == (
            self.position,
            self.rewind,
        )

    def taken_by(self, state: State) -> bool:
        """Whether a hop has taken in everything."""
        return (state.position, state.rewind) == (self.position, self.rewind)


class Watch:
    """Watches one session's steps. Times are seconds, ``now`` an argument."""

    def __init__(self, now: float) -> None:
        self._announced = Pace()
        self._step: float | None = None
        self._row: float | None = None
        self._rows = 0
        self._begun: float | None = None
        """When the step under way was sent; None when its time teaches nothing."""
        self._returned_at = now
        self._quiet_since = now
        self._nonce = 0
        self._asked_at: float | None = None
        self._hops: tuple[str, ...] = ()
        self._answers: dict[str, State] = {}
        self._picture: tuple[str, State] | None = None
        self._rounds = 0
        self._suspects: set[str] = set()

    @property
    def expected(self) -> float:
        """Seconds that what is under way is expected to take."""
        step = self._announced.step if self._step is None else self._step
        row = self._announced.row if self._row is None else self._row
        return Pace(step, row).seconds(self._rows)

    # --- what happens -----------------------------------------------------------------------------

    def announced(self, pace: Pace) -> None:
        """What the hops of a new route say of themselves."""
        self._announced = pace

    def sent(self, rows: int, now: float) -> None:
        """``rows`` more rows are to go around."""
        self._begun = now if self._rows == 0 else None
        self._rows += rows
        self._restart(now)

    def rerouted(self, rows: int, now: float) -> None:
        """There are new hops, and ``rows`` rows have to go through them before anything returns."""
        self._rows, self._begun = rows, None
        self._restart(now)

    def returned(self, now: float, *, everything: bool) -> None:
        """Rows have come back; ``everything``: there is nothing more under way."""
        if everything:
            if self._begun is not None:
                self._learn(now - self._begun)
            self._rows, self._begun = 0, None
        self._suspects.clear()
        self._restart(now)

    def moved(self, now: float) -> None:
        """Something has shown life that is no row: give it time."""
        self._quiet_since, self._asked_at = now, None

    def _restart(self, now: float) -> None:
        self._returned_at = now
        self._picture, self._rounds = None, 0
        self.moved(now)

    def _learn(self, seconds: float) -> None:
        if self._rows == 1:
            old = seconds if self._step is None else self._step
            self._step = old + _SMOOTHING * (seconds - old)
        elif self._rows > 1:
            step = self._announced.step if self._step is None else self._step
            measured = max(0.0, seconds - step) / (self._rows - 1)
            self._row = measured if self._row is None else (self._row + measured) / 2

    # --- what to do -------------------------------------------------------------------------------

    def deadline(self) -> float:
        """When to call ``tick``."""
        if self._asked_at is not None:
            return self._asked_at + min(self._half(), LONGEST_ANSWER)
        return self._quiet_since + min(self._half(), LONGEST_QUIET)

    def _half(self) -> float:
        return max(LEAST, FACTOR * self.expected) / 2

    def ask(self, hops: Sequence[str], now: float) -> int:
        """A round of questions to ``hops``, in the order of the chain; the nonce to ask with."""
        self._nonce += 1
        self._asked_at = now
        self._hops, self._answers = tuple(hops), {}
        return self._nonce

    @property
    def asking(self) -> bool:
        """Whether a round is under way."""
        return self._asked_at is not None

    def unanswered(self, now: float) -> list[str]:
        """End the round: the hops that have not answered."""
        silent = [hop for hop in self._hops if hop not in self._answers]
        self.moved(now)
        return silent

    def answered(self, peer_id: str, state: State, target: Target, now: float) -> list[str]:
        """A hop has answered. With the last answer of a round: the hops to be given up."""
        if self._asked_at is None or state.nonce != self._nonce or peer_id not in self._hops:
            return []
        self._answers[peer_id] = replace(state, nonce=0)
        if len(self._answers) < len(self._hops):
            return []
        self.moved(now)
        return self._judge(target, now)

    def _judge(self, target: Target, now: float) -> list[str]:
        behind = (hop for hop in self._hops if not target.reached_by(self._answers[hop]))
        where = next(behind, self._hops[-1])
        state = self._answers[where]
        self._rounds = self._rounds + 1 if self._picture == (where, state) else 1
        self._picture = where, state
        given_up = now - self._returned_at > max(LEAST_PATIENCE, PATIENCE * self.expected)
        if self._rounds < STUCK_ROUNDS and not given_up:
            return []
        self._picture, self._rounds = None, 0
        before = self._hops[: self._hops.index(where)][-1:]
        if target.taken_by(state) or not before:
            return [where]
        lost = [*self._suspects.intersection(before), where]
        self._suspects.update(before)
        return lost
