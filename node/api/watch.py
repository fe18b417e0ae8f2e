"""What the web page is told: the swarm, this node's own texts and their rings, what was mended.

Rules of this file: the swarm is asked while somebody listens, and at most once an interval, however many
they are: a look costs it a lookup, and each node shown a question. ``models`` is what ``petals-node
status --json`` writes. Of a text nothing is told but how far it is and through whom it runs.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import trio

from ...protocol.announcement import Announcement
from ...protocol.errors import PeerError
from ...protocol.routing import RouteHop
from ..generation import GenerationHandle
from ..mending import Recovery
from ..node import Node, Survey
from ..summary import summarise
from ..wakeup import Signal
from .load import Loads

JSON = dict[str, Any]

SURVEY_INTERVAL = 2.0
SESSIONS_INTERVAL = 0.5
"""Seconds between two looks at our own texts, which cost nobody anything."""
SHOWN_SESSIONS = 32
SHOWN_RECOVERIES = 32


class Watch:
    """One for all who listen. ``run`` is a task that lives as long as the API."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._listeners = 0
        self._wanted = Signal()
        self._looking = trio.Lock()
        self._looked_at = -math.inf
        self._loads = Loads()
        self._peers: Mapping[str, Announcement] = {}
        self._news: dict[str, JSON] = {}
        """The latest of each kind of event."""
        self._changed = Signal()

    async def run(self) -> None:
        """Look as long as somebody listens."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_again_and_again)
            while True:
                await self._until_wanted()
                self._tell("sessions", self._own_sessions())
                await trio.sleep(SESSIONS_INTERVAL)

    async def models(self) -> JSON:
        """The swarm as ``status --json`` has it, no older than the interval. Raises PeerError."""
        swarm = await self._look()
        if swarm["trouble"] is not None:
            raise PeerError(swarm["trouble"])
        return {"models": swarm["models"]}

    @property
    def listeners(self) -> int:
        """How many listen."""
        return self._listeners

    @contextlib.contextmanager
    def listening(self) -> Iterator["Listener"]:
        """For as long as somebody listens."""
        if not self._listeners:
            self._news.clear()  # nobody has looked since the last one left
        self._listeners += 1
        self._wanted.notify()
        try:
            yield Listener(self._news, self._changed)
        finally:
            self._listeners -= 1

    async def _look_again_and_again(self) -> None:
        while True:
            await self._until_wanted()
            await self._look()
            await trio.sleep(SURVEY_INTERVAL)

    async def _until_wanted(self) -> None:
        while not self._listeners:
            await self._wanted.wait()

    async def _look(self) -> JSON:
        async with self._looking:
            age = trio.current_time() - self._looked_at
            if "swarm" in self._news and age < SURVEY_INTERVAL:
                return self._news["swarm"]
            trouble, survey = None, None
            try:
                survey = await self._node.survey()
            except PeerError as error:
                trouble = f"The swarm cannot be asked; trying again. ({error})"
            self._looked_at = trio.current_time()
            self._tell("swarm", self._swarm(survey, trouble))
            return self._news["swarm"]

    def _tell(self, kind: str, event: JSON) -> None:
        if self._news.get(kind) != event:
            self._news[kind] = event
            self._changed.notify()

    # --- the swarm ----------------------------------------------------------------------------

    def _swarm(self, survey: Survey | None, trouble: str | None) -> JSON:
        before = self._news.get("swarm", {"models": [], "load": {}})
        models, load = before["models"], before["load"]
        if survey is not None:
            self._peers = {peer.peer_id: peer for peer, _ in survey}
            models = summarise(peer for peer, _ in survey)
            figures = {peer.peer_id: figures for peer, figures in survey}
            load = self._loads.update(figures, trio.current_time())
        checkpoint = {"model": self._node.model_name, "num_blocks": self._node.num_blocks}
        return {
            "models": models,
            "load": load,
            "node": {"peer_id": self._node.peer_id, **checkpoint},
            "trouble": trouble,
        }

    # --- our own texts ------------------------------------------------------------------------

    def _own_sessions(self) -> JSON:
        recoveries = self._node.recoveries[-SHOWN_RECOVERIES:]
        return {
            "sessions": [self._session(h) for h in self._node.generations[-SHOWN_SESSIONS:]],
            "recoveries": [_recovery(recovery) for recovery in recoveries],
        }

    def _session(self, handle: GenerationHandle) -> JSON:
        status = handle.status()
        route = status.route
        return {
            "id": handle.id,
            "state": status.state,
            "tokens": status.tokens,
            "tokens_per_second": status.tokens_per_second,
            "waiting_for": status.waiting_for,
            "recoveries": status.recoveries,
            "ring": [
                {
                    "peer_id": hop.peer_id,
                    "blocks": [hop.span.start, hop.span.end],
                    "way": self._way(None if before is None else before.peer_id, hop.peer_id),
                    **self._loads.of_a_step(hop.peer_id),
                }
                for before, hop in zip([None, *route], route, strict=False)
            ],
            "way_back": self._way(None, route[-1].peer_id) if route else None,
        }

    def _way(self, sender: str | None, receiver: str) -> float | None:
        """Seconds from one hop to the next, half of the round trip; ``None`` is this node."""
        if sender is None:
            round_trip = self._node.round_trip(receiver)
        else:
            known = self._peers.get(sender)
            round_trip = None if known is None else known.round_trips.get(receiver)
        return None if round_trip is None else round_trip / 2


class Listener:
    """Hears of each kind of event the latest, and none twice."""

    def __init__(self, news: Mapping[str, JSON], changed: Signal) -> None:
        self._news = news
        self._changed = changed
        self._heard: dict[str, JSON] = {}

    async def next(self) -> list[tuple[str, JSON]]:
        """What is new, by kind; waits until something is."""
        while True:
            new = [(k, event) for k, event in self._news.items() if self._heard.get(k) is not event]
            if new:
                self._heard.update(new)
                return new
            await self._changed.wait()


def _recovery(recovery: Recovery) -> JSON:
    return {
        "at": recovery.at,
        "lost": _hop(recovery.lost),
        "reason": recovery.reason,
        "replaced_by": [_hop(hop) for hop in recovery.replaced_by],
        "pause": recovery.pause,
    }


def _hop(hop: RouteHop) -> JSON:
    return {"peer_id": hop.peer_id, "blocks": [hop.span.start, hop.span.end]}
