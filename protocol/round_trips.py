"""Round trips to the peers that a node would use: whom to measure, what to keep, what to announce.

A route needs the latency from the originator to its first hop, from each hop to the next, and from
the last hop back. Each node measures its own part: a server to its likely *successors*, an originator
to those that hold an *end* of the model.

Rules of this file:

* A figure is measured again when it is older than ``FRESH``, and forgotten when it is older than
  ``LIFETIME``; new figures move it half-way, since one ping may have been held up.
* Half of each turn is for the nearest that have grown old, the other for those never measured, drawn
  at random: in a swarm of any size a node comes to know its nearest few, at a fixed cost.
* Whoever could not be measured is left alone for ``RETRY``.
* The nearest few are announced; in a swarm of thousands coordinates do without them.

Time and dice are arguments.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .announcement import MAX_ROUND_TRIP, MAX_ROUND_TRIPS, Announcement
from .dice import Dice
from .span import Span

FRESH = 300.0
"""Seconds. Ways through the Internet change by the hour, and a busy machine's answers by the minute."""
LIFETIME = 1800.0
RETRY = 300.0
MAX_KEPT = 512
"""Figures; the farthest go first. Many more than are announced, since peers come and go."""


def successors(span: Span, peers: Iterable[Announcement]) -> set[str]:
    """The peers that may be the next hop behind one that runs ``span``, or a part of it."""
    return {
        peer.peer_id
        for peer in peers
        if peer.span is not None and peer.span.start <= span.end < peer.span.end
    }


def ends(num_blocks: int, peers: Iterable[Announcement]) -> set[str]:
    """The peers that may be the first or the last hop of a session."""
    return {
        peer.peer_id
        for peer in peers
        if peer.span is not None and (peer.span.start == 0 or peer.span.end == num_blocks)
    }


@dataclass(frozen=True, slots=True)
class _Figure:
    seconds: float
    at: float


class RoundTrips:
    """What this node has measured."""

    def __init__(self) -> None:
        self._figures: dict[str, _Figure] = {}
        self._missed: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<RoundTrips to {len(self._figures)} peers, {len(self._missed)} not measured>"

    def measured(self, peer_id: str, seconds: float, now: float) -> None:
        """A peer was measured."""
        seconds = min(seconds, MAX_ROUND_TRIP)
        old = self._figures.get(peer_id)
        if old is not None and now - old.at < LIFETIME:
            seconds = (old.seconds + seconds) / 2
        self._figures[peer_id] = _Figure(seconds, now)
        self._missed.pop(peer_id, None)
        if len(self._figures) > MAX_KEPT:
            del self._figures[max(self._figures, key=lambda known: self._figures[known].seconds)]

    def missed(self, peer_id: str, now: float) -> None:
        """A peer could not be measured."""
        self._missed[peer_id] = now
        if len(self._missed) > MAX_KEPT:
            del self._missed[next(iter(self._missed))]

    def known(self, now: float) -> dict[str, float]:
        """Seconds by peer, the nearest first."""
        self._figures = {
            peer_id: figure
            for peer_id, figure in self._figures.items()
            if now - figure.at < LIFETIME
        }
        nearest = sorted(self._figures.items(), key=lambda item: item[1].seconds)
        return {peer_id: figure.seconds for peer_id, figure in nearest}

    def nearest(self, peers: Collection[str], count: int, now: float) -> dict[str, float]:
        """Of ``peers``, the nearest that were measured, at most ``count``."""
        among = [item for item in self.known(now).items() if item[0] in peers]
        return dict(among[:count])

    def wanting(self, peers: Collection[str], now: float) -> list[str]:
        """Of ``peers``, those of which there is no fresh figure, as far as they can be asked."""
        return [
            peer_id
            for peer_id in peers
            if not ((figure := self._figures.get(peer_id)) and now - figure.at < FRESH)
            and not (peer_id in self._missed and now - self._missed[peer_id] < RETRY)
        ]

    def turn(self, peers: Collection[str], count: int, now: float, dice: Dice) -> list[str]:
        """Whom of ``peers`` to measure now, at most ``count`` of them."""
        near = self.nearest(peers, MAX_ROUND_TRIPS, now)
        drawn = sorted(self.wanting(peers, now), key=lambda _: dice.random())
        old = [peer_id for peer_id in drawn if peer_id in near]
        others = [peer_id for peer_id in drawn if peer_id not in near]
        others.sort(key=lambda peer_id: peer_id in self._figures)  # the never measured first
        reserved = max(count // 2, count - len(others))
        turn = old[:reserved]
        return turn + others[: count - len(turn)]
