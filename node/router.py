"""Find hops for a session: the node's view of the swarm put through ``protocol/routing.py``."""

import contextlib
from collections.abc import Callable, Sequence

from ..protocol.dice import Dice
from ..protocol.errors import NoRoute, PeerError
from ..protocol.routing import LatencyEstimates, RouteHop, plan_route
from ..protocol.span import Span
from ..protocol.swarm import Swarm
from .membership import Membership


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
        clock: Callable[[], float],
        dice: Dice,
    ) -> None:
        self._membership = membership
        self._swarm = swarm
        self._model_name = model_name
        self._fingerprint = fingerprint
        self._num_blocks = num_blocks
        self._round_trips = round_trips
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
            with contextlib.suppress(PeerError):  # then what is known has to do
                await self._membership.refresh(self._fingerprint, self._num_blocks)
        candidates = self._swarm.candidates(
            self._clock(), self._fingerprint, cache_tokens=cache_tokens
        )
        try:
            route = plan_route(
                candidates,
                span,
                latency=LatencyEstimates.of(candidates, self._round_trips()),
                dice=self._dice,
                exclude=exclude,
                source=source,
                sink=sink,
                model_name=self._model_name,
            )
        except NoRoute as error:
            if fresh:
                await self._membership.check_model(self._model_name, self._fingerprint)
                self._explain(error, cache_tokens)
            raise
        return route.hops

    def _explain(self, error: NoRoute, cache_tokens: int) -> None:
        """If the missing blocks are there but have no room, say so instead."""
        now = self._clock()
        holders = [
            peer
            for peer in self._swarm.candidates(now, self._fingerprint)
            if peer.span is not None and any(peer.span.intersection(gap) for gap in error.missing)
        ]
        if not holders:
            return
        most = max(peer.cache_tokens_left for peer in holders)
        gaps = ", ".join(map(str, error.missing))
        raise NoRoute(
            f"no peer with blocks {gaps} of {self._model_name} has {cache_tokens} tokens of KV "
            f"cache left (the most is {most}): use a shorter prompt, fewer new tokens or a smaller "
            "batch, or try again later",
            missing=error.missing,
        ) from error
