"""When this node moves to other blocks: the loop around ``protocol/placement.py``.

Every node comes to the same plan from the same view, so two seldom move for the same gap; and since
views differ for seconds, whoever wants to move waits for a random time, looks again, and moves only if
that still is the plan. Where blocks are served by nobody, that is a matter of seconds; where a move only
pays, of tens of seconds, as many such reasons pass by themselves.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from ..protocol.dice import Dice
from ..protocol.errors import PetalsError
from ..protocol.placement import Move
from ..protocol.span import Span

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RebalanceSettings:
    """Seconds."""

    urgent_wait: float = 3.0
    """At most, before a move that covers blocks which nobody serves."""
    wait: float = 10.0
    """At most, before a move that only pays."""
    refresh_timeout: float = 15.0
    """For asking the swarm once more before a move; without an answer nobody moves."""
    failed_pause: float = 300.0
    """Before the next try of a node that could not load its new blocks."""


class Rebalance:
    """Moves a node when the swarm gains by it."""

    def __init__(
        self,
        *,
        interval: Callable[[], float],
        look: Callable[[], Awaitable[Move | None]],
        refresh: Callable[[], Awaitable[None]],
        move: Callable[[Span], Awaitable[None]],
        dice: Dice,
        settings: RebalanceSettings | None = None,
    ) -> None:
        """``interval`` is what should pass between two looks now, in seconds. ``look`` says where this node should be, if elsewhere, by what is known now.

        ``refresh`` asks the swarm anew; ``move`` returns when the new span is served. All three may
        raise PetalsError.
        """
        self._interval = interval
        self._look = look
        self._refresh = refresh
        self._move = move
        self._dice = dice
        self._settings = settings or RebalanceSettings()

    async def run(self) -> None:
        """Until cancelled."""
        settings = self._settings
        while True:
            await trio.sleep(self._interval() * (0.5 + self._dice.random()))
            try:
                wanted = await self._wanted()
            except PetalsError as error:
                logger.debug("could not ask the swarm where this node should be: %s", error)
                continue
            if wanted is None:
                continue
            try:
                await self._move(wanted.span)
            except PetalsError as error:
                logger.warning("cannot move to blocks %s: %s", wanted.span, error)
                await trio.sleep(settings.failed_pause)

    async def _wanted(self) -> Move | None:
        """Where to go, if that is so twice with a while between."""
        settings = self._settings
        wanted = await self._look()
        if wanted is None:
            return None
        longest = settings.urgent_wait if wanted.urgent else settings.wait
        await trio.sleep(longest * self._dice.random())
        with trio.move_on_after(settings.refresh_timeout) as asking:
            await self._refresh()
        # Who has lost the others sees gaps everywhere.
        return None if asking.cancelled_caught else await self._look()
