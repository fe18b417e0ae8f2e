"""Find hops for a session: the node's view of the swarm put through ``protocol/routing.py``.

Those that a new session would go through are asked what they carry, and the choice is looked at again
(``protocol/choice.py``). A recovery asks nobody: its text stands still meanwhile.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import trio

from ..protocol.announcement import Announcement
from ..protocol.choice import Choice
from ..protocol.coordinates import Coordinate
from ..protocol.dice import Dice
from ..protocol.errors import NoRoute, PeerError
from ..protocol.expected import EXPECTED_BLOCKS
from ..protocol.routing import LatencyEstimates, Route, RouteHop, plan_by_places, plan_route
from ..protocol.span import Span
from ..protocol.swarm import Swarm
from .describe import Ask
from .membership import Membership

REFRESH_TIMEOUT = 3.0
"""Seconds for asking the swarm anew. A frozen peer holds that up for longer, and a session that
waits had better look at what is known again."""
ASK_TIMEOUT = 2.0
"""Seconds for a candidate to say what it carries, being dialled first if need be: six round trips."""
CHOICE_TIMEOUT = 3.0
"""Seconds for asking in all. What is known then has to do."""


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
        coordinate: Callable[[], Coordinate],
        ask: Ask,
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
        self._coordinate = coordinate
        self._ask = ask
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
        try:
            choice = self._choice(cache_tokens, plan)
        except NoRoute:
            if not fresh:
                raise
        else:
            if source is None and sink is None:
                with trio.move_on_after(CHOICE_TIMEOUT):
                    await self._ask_candidates(choice, cache_tokens)
            return choice.route.hops
        with contextlib.suppress(PeerError), trio.move_on_after(REFRESH_TIMEOUT):
            await self._membership.check_model(self._model_name, self._fingerprint)
        everybody = {peer.peer_id: peer for peer in self._candidates(0, urgent=True)}
        full = plan(everybody.values()).hops  # raises, and names the blocks, if there is a gap
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
    ) -> Route:
        def plan(peers: Sequence[Announcement], latency: LatencyEstimates) -> Route:
            return plan_route(
                peers,
                span,
                latency=latency,
                dice=self._dice,
                exclude=exclude,
                failures=self._swarm.failures,
                source=source,
                sink=sink,
                model_name=self._model_name,
            )

        return plan_by_places(
            candidates,
            plan,
            measured=self._round_trips(),
            own=self._coordinate(),
            dice=self._dice,
            source=source,
            sink=sink,
        )

    def _choice(
        self, cache_tokens: int, plan: Callable[[Collection[Announcement]], Route]
    ) -> Choice:
        with contextlib.suppress(NoRoute):
            return Choice(self._candidates(cache_tokens), plan)
        # whoever failed a while ago is better than nobody, and asking the swarm takes longer
        return Choice(self._candidates(cache_tokens, urgent=True), plan)

    async def _ask_candidates(self, choice: Choice, cache_tokens: int) -> None:
        """Ask those on the route what they carry, and those on the next one, until it stays."""
        while asked := choice.to_ask():
            expected = await self._expected_blocks(asked)
            choice.heard(
                asked,
                [
                    replace(peer, session_blocks=peer.session_blocks + expected[peer.peer_id])
                    for peer in self._candidates(cache_tokens, urgent=True)
                    if peer.peer_id in expected
                ],
            )

    async def _expected_blocks(self, asked: Sequence[RouteHop]) -> dict[str, int]:
        """Of those that answer, what they expect beside what they now announce."""
        expected: dict[str, int] = {}

        async def ask(hop: RouteHop) -> None:
            try:
                with trio.move_on_after(ASK_TIMEOUT):
                    said, figures = await self._ask(
                        hop.peer_id, hop.multiaddrs, blocks=len(hop.span)
                    )
                    if said is not None:
                        self._swarm.update(said, self._clock())
                        expected[hop.peer_id] = max(0, int(figures.get(EXPECTED_BLOCKS, 0)))
            except PeerError:
                self._swarm.failed(hop.peer_id, self._clock())

        async with trio.open_nursery() as nursery:
            for hop in asked:
                nursery.start_soon(ask, hop)
        return expected

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
