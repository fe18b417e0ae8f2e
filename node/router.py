"""Find hops for a session: the node's view of the swarm put through ``protocol/routing.py``."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from functools import partial

import trio

from ..protocol.announcement import Announcement
from ..protocol.dice import Dice
from ..protocol.errors import NoRoute, PeerError
from ..protocol.routing import LatencyEstimates, RouteHop, plan_route
from ..protocol.span import Span
from ..protocol.swarm import Swarm
from .membership import Membership

REFRESH_TIMEOUT = 3.0
"""Seconds for asking the swarm anew. A frozen peer holds that up for longer, and a session that
waits had better look at what is known again."""


class SwarmRouter:
    """Plans over what the swarm is known to be; asks it anew when that is not enough."""

    def __init__(
        self,
        membership: Membership,
        swarm: Swarm,
        *,
        model_name: str,
        fingerprint: str,
        num_blocks: int,
        round_trips: Callable[[], dict[str, float]],
        ourselves: Callable[[], Announcement | None],
        clock: Callable[[], float],
        dice: Dice,
    ) -> None:
        self._membership = membership
        self._swarm = swarm
        self._model_name = model_name
        self._fingerprint = fingerprint
        self._num_blocks = num_blocks
        self._round_trips = round_trips
        self._ourselves = ourselves
        self._clock = clock
        self._dice = dice

    async def route(
        self,
        span: Span,
        *,
        cache_tokens: int,
        exclude: frozenset[str],
        source: str | None,
        sink: str | None,
        fresh: bool,
    ) -> Sequence[RouteHop]:
        """Hops for ``span``. Raises NoRoute, or ModelMismatch if the swarm's model is another."""
        if fresh:
            with contextlib.suppress(PeerError), trio.move_on_after(REFRESH_TIMEOUT):
                await self._membership.refresh(self._fingerprint, self._num_blocks)
            # whatever it has brought, has to do
        plan = partial(self._plan, span=span, exclude=exclude, source=source, sink=sink)
        with contextlib.suppress(NoRoute):
            return plan(self._candidates(cache_tokens))
        try:  # whoever failed a while ago is better than nobody, and asking the swarm takes longer
            return plan(self._candidates(cache_tokens, urgent=True))
        except NoRoute:
            if not fresh:
                raise
        with contextlib.suppress(PeerError), trio.move_on_after(REFRESH_TIMEOUT):
            await self._membership.check_model(self._model_name, self._fingerprint)
        everybody = {peer.peer_id: peer for peer in self._candidates(0, urgent=True)}
        full = plan(everybody.values())  # raises, and names the blocks, if there is a gap
        left = {hop: everybody[hop.peer_id].cache_tokens_left for hop in full}
        short = [hop for hop in full if left[hop] < cache_tokens]
        raise NoRoute(
            f"no peer with blocks {', '.join(str(hop.span) for hop in short)} of "
            f"{self._model_name} has {cache_tokens} tokens of KV cache left (the best has "
            f"{min(left.values())}): use a shorter prompt, fewer new tokens or a smaller batch, "
            "or try again later",
            missing=[hop.span for hop in short],
        )

    def _plan(
        self,
        candidates: Collection[Announcement],
        *,
        span: Span,
        exclude: frozenset[str],
        source: str | None,
        sink: str | None,
    ) -> Sequence[RouteHop]:
        route = plan_route(
            candidates,
            span,
            latency=LatencyEstimates.of(candidates, self._round_trips()),
            dice=self._dice,
            exclude=exclude,
            failures=self._swarm.failures,
            source=source,
            sink=sink,
            model_name=self._model_name,
        )
        return route.hops

    def _candidates(self, cache_tokens: int, *, urgent: bool = False) -> list[Announcement]:
        """Who may be a hop, this node included (the swarm's view is of the others)."""
        now = self._clock()
        candidates = self._swarm.candidates(
            now, self._fingerprint, cache_tokens=cache_tokens, urgent=urgent
        )
        own = self._ourselves()
        if own is not None and self._swarm.usable(own.peer_id, now, urgent=urgent):
            candidates += [own] if own.cache_tokens_left >= cache_tokens else []
        return candidates
