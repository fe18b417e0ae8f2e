"""What a session remembers of the hops that it lost: who they were, why, who came instead, the pause.

For people who watch; the session itself decides by nothing of this.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..protocol.routing import RouteHop

MAX_REMEMBERED = 64
"""Of a session: a swarm that falls apart again and again must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """A hop that was lost, and what the session did about it."""

    at: float
    """Unix seconds."""
    lost: RouteHop
    reason: str
    replaced_by: tuple[RouteHop, ...] = ()
    """Empty while nobody has been found."""
    pause: float | None = None
    """Seconds from the loss until hidden states came back again; None: not yet."""


class Mending:
    """The losses of one session, the oldest first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: list[Recovery] = []
        self._over: deque[Recovery] = deque(maxlen=MAX_REMEMBERED)

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """All that are remembered."""
        return (*self._over, *self._open)

    def lost(self, hop: RouteHop, reason: str) -> None:
        """A hop is no longer part of the route."""
        self._open = [*self._open, Recovery(self._clock(), hop, reason)][-MAX_REMEMBERED:]

    def routed(self, hops: Iterable[RouteHop]) -> None:
        """Others have been found for what was missing."""
        found = tuple(hops)
        self._open = [
            replace(
                recovery,
                replaced_by=tuple(
                    hop for hop in found if hop.span.intersection(recovery.lost.span) is not None
                ),
            )
            for recovery in self._open
        ]

    def returned(self) -> None:
        """Rows have come back. Those that were under way when a hop was lost end no pause."""
        if not self._open or not all(recovery.replaced_by for recovery in self._open):
            return  # nearly every token: nothing is open
        now = self._clock()
        for recovery in self._open:
            self._over.append(replace(recovery, pause=max(0.0, now - recovery.at)))
        self._open = []
