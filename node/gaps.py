"""Hops for the blocks that a session misses, from the hop before a gap to the hop behind it."""

from collections.abc import Sequence
from typing import Protocol

from ..protocol.chain import ChainHop, SessionTerms
from ..protocol.checks import Peer
from ..protocol.routing import RouteHop
from ..protocol.span import Span


class Router(Protocol):
    """Finds peers for missing blocks."""

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
        """Hops for ``span`` in order. Raises NoRoute.

        ``source`` and ``sink`` are the peers before and behind it, None for the originator.
        ``fresh``: ask the swarm again first, what is known was not enough.
        """
        ...


class Gaps:
    """Fills the gaps of one session."""

    def __init__(self, router: Router, terms: SessionTerms) -> None:
        self._router = router
        self._cache_tokens = terms.batch * terms.max_tokens

    async def fill(
        self, missing: Sequence[Span], kept: Sequence[ChainHop], *, fresh: bool
    ) -> list[ChainHop]:
        """Hops for all of ``missing``, of other peers than those of ``kept``. Raises NoRoute."""
        hops: list[ChainHop] = []
        for gap in missing:
            route = await self._router.route(
                gap,
                cache_tokens=self._cache_tokens,
                exclude=frozenset(hop.peer.peer_id for hop in (*kept, *hops)),
                source=next((h.peer.peer_id for h in kept if h.span.end == gap.start), None),
                sink=next((h.peer.peer_id for h in kept if h.span.start == gap.end), None),
                fresh=fresh,
            )
            hops += [
                ChainHop(Peer(hop.peer_id, hop.multiaddrs), hop.span, pace=hop.pace)
                for hop in route
            ]
        return hops
