"""How fast weights go out: no faster than the user allows, and slower, in bursts, while sessions compute.

Where little is allowed, few are given to at a time: each gets a chunk before it takes us for dead.
"""

import math
import sys
from collections.abc import Callable

import trio

from ..protocol.admission import Bursts, Pace
from ..protocol.download import LEAST_RATE

AT_ONCE = 0.1
"""Seconds of the allowed rate that may go at once after a pause."""
LOOK_SECONDS = 0.25
"""Between two looks at whether sessions compute."""
BUSY_SHARE = 0.02
"""Of the time; what is less is no session that decodes."""
STAY_SECONDS = 3.0
"""After the last work that was seen: that of a step counts when it is done, and it may take a second."""
BUSY_RATE = 8 * 1024 * 1024
"""Bytes a second while sessions compute: what a good line from a home carries. Reading, encrypting and
sending them takes a fortieth of a core, of a machine of which the sessions could use all."""
BUSY_BURST = 4 * 1024 * 1024
"""Bytes that go one behind the other then, before a long pause. Every thread of a step waits for the one
that was interrupted: with a chunk of 0.5 MiB at a time each step is, with bursts one in ten. At
16 MiB a second on two cores, which the fetching process shares, that made a step 1.35 × and 1.2 × as long
as alone; at 8 MiB a second with bursts it is 1.03 × to 1.16 ×."""
LEAST_LIMIT = 2 * LEAST_RATE
"""Bytes a second that may be allowed at least, for each peer that is given to at a time."""


class Uploads:
    """When the next bytes may go. One for the whole node."""

    def __init__(self, bytes_per_second: float | None, busy_seconds: Callable[[], float]) -> None:
        """``busy_seconds``: how long the blocks of this node have computed so far."""
        self.most_streams = (
            sys.maxsize if bytes_per_second is None else max(1, int(bytes_per_second / LEAST_LIMIT))
        )
        """How many peers may be given to at once."""
        self._allowed = None if bytes_per_second is None else _pace(bytes_per_second)
        self._beside = Bursts(BUSY_RATE, BUSY_BURST)
        self._busy_seconds = busy_seconds
        self._looked_at = -math.inf
        self._busy_then = 0.0
        self._busy_until = -math.inf

    async def turn(self, size: int) -> None:
        """Return when the next ``size`` bytes may go."""
        now = trio.current_time()
        wait = 0.0 if self._allowed is None else self._allowed.take(now, size)
        if self._sessions_compute(now):
            wait = max(wait, self._beside.take(now, size))
        if wait > 0:
            await trio.sleep(wait)

    def _sessions_compute(self, now: float) -> bool:
        elapsed = now - self._looked_at
        if elapsed >= LOOK_SECONDS:
            busy = self._busy_seconds()
            if busy - self._busy_then > BUSY_SHARE * min(elapsed, 4 * LOOK_SECONDS):
                self._busy_until = now + STAY_SECONDS
            self._looked_at, self._busy_then = now, busy
        return now < self._busy_until


def _pace(bytes_per_second: float) -> Pace:
    return Pace(bytes_per_second, max(1, int(AT_ONCE * bytes_per_second)))
