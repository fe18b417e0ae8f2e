"""Measure the ways to the peers that this node would use, now and then, a few at a time.

What to measure and what to make of it is in ``protocol/round_trips.py``; here are the connections.

Rules of this file: a peer is measured by its connection's own pings; whoever is not connected is
asked to describe itself, which opens a connection and brings news of it. What was measured pulls this
node's coordinate to its place (``protocol/coordinates.py``). A connection that was opened
for that is closed at the next turn if nothing uses it by then: what many nodes measure must not fill
up with connections. A peer that does not answer is left alone and not blamed.
"""

import logging
from collections.abc import Callable, Collection, Sequence

import trio

from ..protocol.announcement import Announcement
from ..protocol.coordinates import MAX_SPRINGS, Coordinate, relaxed
from ..protocol.dice import Dice
from ..protocol.errors import PeerError
from ..protocol.round_trips import RoundTrips
from .describe import Ask
from .network import Network

logger = logging.getLogger(__name__)

INTERVAL = 30.0
"""Seconds between two turns, give or take a tenth, so that nodes do not march in step."""
FIRST_INTERVAL = 3.0
"""The same while there are peers that were never measured, and few that were."""
FEW = 4
"""Enough to plan with, for a start."""
AT_ONCE = 4
"""Peers in one turn: each costs a handshake of a few milliseconds, if it is not connected."""


class LatencyWatch:
    """Keeps the round trips to some peers, in a task of its owner's nursery (``run``)."""

    def __init__(
        self,
        network: Network,
        *,
        candidates: Callable[[], Sequence[Announcement]],
        ask: Ask,
        heard: Callable[[Announcement], object],
        dice: Dice,
    ) -> None:
        """``candidates`` says whom this node would use; ``heard`` takes what they say of themselves."""
        self._network = network
        self._candidates = candidates
        self._ask = ask
        self._heard = heard
        self._dice = dice
        self._round_trips = RoundTrips()
        self._coordinate = Coordinate()
        self._met: dict[str, Announcement] = {}
        """What those said who were measured last: in a large swarm they are soon no candidates any more."""
        self._opened: set[str] = set()
        """Whom we have connected to for measuring."""

    def known(self) -> dict[str, float]:
        """Seconds to the peers that were measured, and to those that we are connected to now."""
        network = self._network
        live = {peer_id: network.round_trip(peer_id) for peer_id in network.connected_peers()}
        return self._round_trips.known(trio.current_time()) | {
            peer_id: seconds for peer_id, seconds in live.items() if seconds is not None
        }

    def measured(self) -> Collection[str]:
        """The peers that were measured, the nearest first."""
        return self._round_trips.known(trio.current_time()).keys()

    def nearest(self, peers: Collection[str], count: int) -> dict[str, float]:
        """Of ``peers``, the nearest, which are worth announcing."""
        return self._round_trips.nearest(peers, count, trio.current_time())

    @property
    def coordinate(self) -> Coordinate:
        """Where this node is, and how sure it is of that."""
        return self._coordinate

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            pause = INTERVAL if await self.turn() else FIRST_INTERVAL
            await trio.sleep(pause * (0.9 + 0.2 * self._dice.random()))

    async def turn(self) -> bool:
        """Measure a few; whether that is enough for a while."""
        candidates = {peer.peer_id: peer for peer in (*self._met.values(), *self._candidates())}
        for peer_id in self._network.connected_peers():
            if peer_id in candidates:
                self._meet(candidates[peer_id])
        for peer_id in self._opened:
            await self._network.release(peer_id)
        self._opened.clear()
        chosen = self._round_trips.turn(candidates, AT_ONCE, trio.current_time(), self._dice)
        async with trio.open_nursery() as nursery:
            for peer_id in chosen:
                nursery.start_soon(self._measure, candidates[peer_id])
        now = trio.current_time()
        self._find_place(now)
        return len(self._round_trips.nearest(candidates, FEW, now)) == FEW or (
            bool(candidates) and not self._round_trips.wanting(candidates, now)
        )

    async def _measure(self, peer: Announcement) -> None:
        connected = peer.peer_id in self._network.connected_peers()
        try:
            said, _ = await self._ask(peer.peer_id, peer.multiaddrs)
        except PeerError as error:
            logger.debug("not measured: %s", error)
            self._round_trips.missed(peer.peer_id, trio.current_time())
            self._met.pop(peer.peer_id, None)
            return
        if not connected:
            self._opened.add(peer.peer_id)
        if said is not None:
            self._heard(said)
        self._meet(said or peer)

    def _find_place(self, now: float) -> None:
        springs = [
            (place, seconds)
            for peer_id, seconds in self._round_trips.known(now).items()
            if peer_id in self._met and (place := self._met[peer_id].coordinate) is not None
        ]
        self._coordinate = relaxed(self._coordinate, springs, self._dice)

    def _meet(self, peer: Announcement) -> None:
        """Note what the connection's pings say, if one has come back; else the next turn does."""
        self._met.pop(peer.peer_id, None)
        self._met[peer.peer_id] = peer
        if len(self._met) > MAX_SPRINGS:
            del self._met[next(iter(self._met))]
        seconds = self._network.round_trip(peer.peer_id)
        if seconds is not None:
            self._round_trips.measured(peer.peer_id, seconds, trio.current_time())
