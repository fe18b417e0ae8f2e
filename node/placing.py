"""Where this node's blocks should be: what ``protocol/placement.py`` is fed with.

Rules of this file: a plan is made by a view in which nobody who is there is missing, for what is missing
looks like a gap. In a large swarm, where readings are rare and announcements expire between two of them,
whoever looks therefore reads first. Of a swarm that is too large to be read, the holders of its
announcements are asked for what they have counted.
"""

import contextlib
from collections.abc import Callable

import trio

from ..protocol.announcement import Announcement
from ..protocol.dice import Dice
from ..protocol.errors import PeerError
from ..protocol.placement import (
    Move,
    choose_span,
    choose_span_by,
    placed,
    should_level,
    should_move,
)
from ..protocol.span import Span
from ..protocol.swarm import Swarm
from ..protocol.upkeep import SHORTEST_LOOK
from .membership import Membership

LOOK_INTERVAL = 5.0
"""Seconds between two looks at whether to move, where what is known is all that there is: that costs
nothing."""


class Placing:
    """Chooses blocks of one model for a node that can hold so many of them."""

    def __init__(
        self,
        membership: Membership,
        swarm: Swarm,
        *,
        fingerprint: str,
        num_blocks: int,
        capacity_blocks: int,
        ourselves: Callable[[], Announcement | None],
        clock: Callable[[], float],
        dice: Dice,
    ) -> None:
        """``ourselves``: as we announce it; None while we serve nothing. ``clock`` tells unix time."""
        self._membership = membership
        self._swarm = swarm
        self._model = fingerprint, num_blocks
        self._capacity = capacity_blocks
        self._ourselves = ourselves
        self._clock = clock
        self._dice = dice

    async def choose(self) -> Span:
        """Where a node that joins is needed most."""
        with contextlib.suppress(PeerError):  # nobody there: everything is equally weak
            await self._membership.refresh(*self._model)
        fingerprint, num_blocks = self._model
        if self._membership.shows_a_sample(*self._model):
            totals = await self._membership.totals(*self._model)
            if totals is not None:
                return choose_span_by(totals.serving, totals.loading, self._capacity, self._dice)
        known = self._swarm.peers(self._clock(), fingerprint)
        return choose_span(known, num_blocks, self._capacity, self._dice)

    def interval(self) -> float:
        """Seconds between two looks."""
        wanted = self._membership.upkeep.look_interval
        return LOOK_INTERVAL if wanted <= SHORTEST_LOOK else wanted

    async def look(self) -> Move | None:
        """Where this node should be, if elsewhere, by what is known, or read now if that is too old.

        Raises PeerError when it had to be read and could not be.
        """
        upkeep = self._membership.upkeep
        if not self._membership.shows_a_sample(*self._model):
            # by then the first who were read have expired, although they are still there
            first_gone = upkeep.time_to_live - upkeep.announce_interval
            await self._membership.refresh(*self._model, max_age=first_gone)
        fingerprint, num_blocks = self._model
        sample = self._membership.shows_a_sample(*self._model)
        totals = await self._membership.totals(*self._model) if sample else None
        own = self._ourselves()
        if own is None or (sample and totals is None):
            return None
        (ours,) = placed([own], num_blocks)
        if totals is not None:
            return should_level(ours, totals.throughput, self._capacity)
        others = placed(self._swarm.peers(self._clock(), fingerprint), num_blocks)
        # a plan for a dozen nodes takes a quarter of a second when it is made for the first time
        return await trio.to_thread.run_sync(should_move, ours, others, num_blocks, self._capacity)

    async def know_anew(self) -> None:
        """Read what the next look goes by. Raises PeerError when that cannot be."""
        if not self._membership.shows_a_sample(*self._model):  # else every look asks the holders
            await self._membership.refresh(*self._model)
