"""What this node believes about its peers.

Rules of this file: of two announcements by one peer the one with the higher sequence holds; one
that has expired is as good as none; a peer that failed us is left alone for a while, longer each
time, and ranks lower for long; one that refused us is left alone for as long as it asked; a peer
that lied is left alone for good. Where nobody else is left, one that failed us is tried again sooner:
a session had better wait for it than for nobody. Time is an argument.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .announcement import Announcement, PeerState
from .errors import ModelMismatch
from .span import Span, coverage, gaps

MAX_PEERS = 16_384
"""Announcements kept; about 2 KB each. Whoever makes up more peers than this gains nothing."""
MAX_BANNED = 4096
FIRST_BACKOFF = 1.0
"""Seconds that a peer is avoided after its first failure; each further one doubles them."""
MAX_BACKOFF = 300.0
URGENT_BACKOFF = 2.0
"""The longest that a peer is avoided after a failure when there is nobody else."""


@dataclass(frozen=True, slots=True)
class _Failures:
    count: int
    retry_at: float
    urgent_at: float
    """The same where there is nobody else."""


class Swarm:
    """The peers that this node knows of, itself not among them."""

    def __init__(self, own_peer_id: str) -> None:
        self.own_peer_id = own_peer_id
        self._announcements: dict[str, Announcement] = {}
        self._failures: dict[str, _Failures] = {}
        self._banned: dict[str, None] = {}

    def __repr__(self) -> str:
        return (
            f"<Swarm of {len(self._announcements)} peers, {len(self._failures)} avoided, "
            f"{len(self._banned)} banned>"
        )

    def update(self, announcement: Announcement, now: float) -> bool:
        """Take in an announcement; returns whether it was news."""
        known = self._announcements.get(announcement.peer_id)
        if (
            announcement.peer_id == self.own_peer_id
            or announcement.expires_at <= now
            or (known is not None and announcement.sequence <= known.sequence)
        ):
            return False
        if known is None and len(self._announcements) >= MAX_PEERS:
            self._make_room(now)
        # an offline peer is kept until it expires, so that no older announcement revives it
        self._announcements[announcement.peer_id] = announcement
        return True

    def _make_room(self, now: float) -> None:
        self.expire(now)
        by_expiry = sorted(self._announcements.values(), key=lambda known: known.expires_at)
        for known in by_expiry[: len(by_expiry) - MAX_PEERS * 7 // 8]:
            del self._announcements[known.peer_id]

    def expire(self, now: float) -> None:
        """Forget what no longer holds at ``now``."""
        self._announcements = {
            peer_id: known
            for peer_id, known in self._announcements.items()
            if known.expires_at > now
        }
        # a peer that has been left in peace for the longest backoff starts anew
        self._failures = {
            peer_id: failures
            for peer_id, failures in self._failures.items()
            if failures.retry_at + MAX_BACKOFF > now
        }

    def get(self, peer_id: str, now: float) -> Announcement | None:
        """What ``peer_id`` last said of itself, if that still holds."""
        known = self._announcements.get(peer_id)
        return None if known is None or known.expires_at <= now else known

    def peers(self, now: float, fingerprint: str | None = None) -> list[Announcement]:
        """All peers that are there, whatever they are doing; of one model, or of every model."""
        return [
            known
            for known in self._announcements.values()
            if known.expires_at > now
            and known.state is not PeerState.OFFLINE
            and fingerprint in (None, known.model)
        ]

    def candidates(
        self, now: float, fingerprint: str, *, cache_tokens: int = 0, urgent: bool = False
    ) -> list[Announcement]:
        """The peers that a new session may use: online, with room, neither failing nor banned.

        ``urgent``: also those that failed us a moment ago.
        """
        return [
            known
            for known in self.peers(now, fingerprint)
            if known.state is PeerState.ONLINE
            and known.span is not None
            and known.cache_tokens_left >= cache_tokens
            and self.usable(known.peer_id, now, urgent=urgent)
        ]

    def usable(self, peer_id: str, now: float, *, urgent: bool = False) -> bool:
        """Whether a peer is neither banned nor avoided."""
        if peer_id in self._banned:
            return False
        failures = self._failures.get(peer_id)
        return failures is None or now >= (failures.urgent_at if urgent else failures.retry_at)

    def coverage(self, now: float, fingerprint: str, num_blocks: int) -> list[int]:
        """How many online peers serve each block."""
        return coverage(self._online_spans(now, fingerprint), num_blocks)

    def missing(self, now: float, fingerprint: str, num_blocks: int) -> list[Span]:
        """The runs of blocks that no online peer serves."""
        return gaps(self._online_spans(now, fingerprint), num_blocks)

    def _online_spans(self, now: float, fingerprint: str) -> list[Span]:
        return [
            known.span
            for known in self.peers(now, fingerprint)
            if known.state is PeerState.ONLINE and known.span is not None
        ]

    def failed(self, peer_id: str, now: float) -> float:
        """A peer failed us. Returns when it may be tried again."""
        count = self.failures(peer_id) + 1
        # 2 ** 9 seconds are over the maximum already
        backoff = min(MAX_BACKOFF, FIRST_BACKOFF * 2.0 ** min(count - 1, 9))
        self._avoid(peer_id, count, now, backoff, min(backoff, URGENT_BACKOFF))
        return now + backoff

    def refused(self, peer_id: str, now: float, retry_after: float) -> None:
        """A peer has no room, or is leaving, and said when to ask again: that is no failure."""
        self._avoid(peer_id, self.failures(peer_id), now, retry_after, retry_after)

    def _avoid(
        self, peer_id: str, count: int, now: float, seconds: float, urgent_seconds: float
    ) -> None:
        if peer_id not in self._failures and len(self._failures) >= MAX_PEERS:
            self.expire(now)
            while len(self._failures) >= MAX_PEERS:
                del self._failures[next(iter(self._failures))]
        self._failures[peer_id] = _Failures(count, now + seconds, now + urgent_seconds)

    def succeeded(self, peer_id: str) -> None:
        """A peer served a session to its end: it may be tried at once, and one failure is forgiven.

        Only one, so that a peer that comes and goes sinks.
        """
        count = self.failures(peer_id) - 1
        if count > 0:
            self._failures[peer_id] = _Failures(count, 0.0, 0.0)
        else:
            self._failures.pop(peer_id, None)

    def failures(self, peer_id: str) -> int:
        """How often a peer has failed us lately, less what it has made good."""
        failures = self._failures.get(peer_id)
        return 0 if failures is None else failures.count

    def retry_at(self, peer_id: str) -> float:
        """When a peer that failed us may be tried again; 0 if it did not fail us."""
        failures = self._failures.get(peer_id)
        return 0.0 if failures is None else failures.retry_at

    def ban(self, peer_id: str) -> None:
        """Never use this peer again (the oldest of very many bans is lifted)."""
        self._banned[peer_id] = None
        if len(self._banned) > MAX_BANNED:
            del self._banned[next(iter(self._banned))]

    @property
    def banned(self) -> frozenset[str]:
        """The peers that are never used."""
        return frozenset(self._banned)


def model_mismatch(
    announcements: Iterable[Announcement], model_name: str, fingerprint: str
) -> ModelMismatch | None:
    """The error to raise if peers serve a model of that name, but none serves this very one."""
    others: dict[str, int] = {}
    for announcement in announcements:
        if announcement.model_name == model_name and announcement.state is not PeerState.OFFLINE:
            others[announcement.model] = others.get(announcement.model, 0) + 1
    if not others or fingerprint in others:
        return None
    return ModelMismatch(
        f"no peer serves {model_name} with your weights and configuration (fingerprint "
        f"{fingerprint[:16]}); what the swarm calls {model_name} is {_counted(others)}. Load the "
        "checkpoint that they serve, or start nodes that serve yours"
    )


def _counted(models: Mapping[str, int]) -> str:
    return ", ".join(
        f"{fingerprint[:16]} ({count} {'peer' if count == 1 else 'peers'})"
        for fingerprint, count in sorted(models.items(), key=lambda item: (-item[1], item[0]))
    )
