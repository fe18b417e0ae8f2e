"""Whether this node gives a peer more: the limits, and who holds what.

Rules of this file:

* A limit in all is what this node spends at most; a limit per peer is what one of them may have of
  it, so that none crowds out the others by greed or by mistake. Identities cost nothing: against
  somebody who makes up many, only the limits in all help.
* Whoever is refused is told why, and when to ask again. What was given is never taken back half-way.
* This node's own sessions count, but no limit per peer is for them.

Here are figures only; what they are figures of lives in ``node/``. Time is an argument.
"""

import math
from dataclasses import dataclass

from .errors import ConfigError, PetalsError

RETRY_AFTER = 5.0
"""Seconds; about what a short answer takes. Nobody knows when a session will end."""
_MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class AdmissionLimits:
    """What this node gives in all, and to one peer. Raises ConfigError for what cannot be."""

    max_sessions: int = 1024
    """Sessions in all, whatever the cache would hold: each costs tasks and streams (20 KB), and up
    to three frames of 4 MiB that have arrived and are not computed."""
    peer_sessions: int = 128
    """Sessions of one peer: more than a busy front end runs at once, an eighth of all."""
    peer_cache_share: float = 0.5
    """Share of the KV cache that one peer's sessions may reserve together, so that others find
    room. A peer that has no session here may open one of any size: what a small node holds is of
    use to somebody, and a stranger could take it under two names anyway."""
    peer_backlog: int = 64
    """MiB of hidden states that were taken in for one peer's sessions and are not computed; more
    wait where they come from. Sixteen of the largest frames keep any device busy."""
    max_connections: int = 500
    """Connections in all: each costs a socket, tasks and buffers. A fifth is kept for those that
    this node dials itself, which it needs to serve at all."""
    peer_connections: int = 4
    """Connections of one peer, of which the oldest gives way: two that dial each other at once have
    two, and as many again if they do it before they know that the old ones are dead."""
    peer_streams: int = 1024
    """Streams that one peer may have open here, over all its connections: two for each of its
    sessions, or one for each session that reaches us through it."""
    peer_opens: float = 100.0
    """Streams a second that one connection may open for long (``OPENS_AT_ONCE`` at once); more wait.
    A stream with a session on it costs 1.5 ms: without a bound, one peer takes all of a core."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "peer_cache_share":
                if not 0 < value <= 1:
                    raise ConfigError(f"{name}: must be above 0 and at most 1, got {value}")
            elif not value >= 1:
                raise ConfigError(f"{name}: must be at least 1, got {value}")


OPENS_AT_ONCE = 256
"""What a peer may open before it is slowed down: all its sessions at once, with their links."""


class NotAdmitted(PetalsError):
    """A session that this node does not take now; the message is for the peer."""

    def __init__(self, reason: str, *, peer_id: str | None) -> None:
        super().__init__(reason)
        self.retry_after = RETRY_AFTER
        self.peer_id = peer_id
        """Whose sessions would have to end first; None: anybody's."""


@dataclass(slots=True)
class _Holding:
    """What one peer has."""

    peer_id: str
    backlog_limit: float
    sessions: int = 0
    cache_tokens: int = 0
    backlog: int = 0


class Admission:
    """Who has how much of this node, and who may have more."""

    def __init__(self, limits: AdmissionLimits, *, own_peer_id: str, cache_tokens: int) -> None:
        """``cache_tokens``: the node's whole KV cache."""
        self._limits = limits
        self._own_peer_id = own_peer_id
        self._peer_tokens = int(cache_tokens * limits.peer_cache_share)
        self._holdings: dict[str, _Holding] = {}
        """Of the peers that have a session here."""
        self._sessions = 0

    def __repr__(self) -> str:
        return f"<Admission of {self._sessions} sessions of {len(self._holdings)} peers>"

    def admit(self, peer_id: str, *, cache_tokens: int) -> "Ticket":
        """Let ``peer_id`` open a session that reserves so many tokens. Raises NotAdmitted."""
        limits, own = self._limits, peer_id == self._own_peer_id
        if self._sessions >= limits.max_sessions:
            raise NotAdmitted(f"this node has {self._sessions} sessions already", peer_id=None)
        held = self._holdings.get(peer_id)
        if held is not None and not own:
            if held.sessions >= limits.peer_sessions:
                raise NotAdmitted(
                    f"you have {held.sessions} sessions here, and no peer may have more",
                    peer_id=peer_id,
                )
            if held.cache_tokens + cache_tokens > self._peer_tokens:
                raise NotAdmitted(
                    f"your sessions here have {held.cache_tokens} of the {self._peer_tokens} tokens "
                    f"of KV cache that one peer may have, and this one needs {cache_tokens}",
                    peer_id=peer_id,
                )
        if held is None:
            held = _Holding(peer_id, math.inf if own else limits.peer_backlog * _MIB)
            self._holdings[peer_id] = held
        self._sessions += 1
        return Ticket(self, held, cache_tokens)

    def _leave(self, held: _Holding) -> None:
        self._sessions -= 1
        if held.sessions == 0:
            del self._holdings[held.peer_id]


class Ticket:
    """What one session was given; everything goes back with ``release``."""

    def __init__(self, admission: Admission, held: _Holding, cache_tokens: int) -> None:
        self._admission = admission
        self._held = held
        self._cache_tokens = cache_tokens
        self._backlog = 0
        self._released = False
        held.sessions += 1
        held.cache_tokens += cache_tokens

    @property
    def backlogged(self) -> bool:
        """Whether nothing more is to be taken in for the peer until something was computed."""
        return self._held.backlog >= self._held.backlog_limit

    def took_in(self, size: int) -> None:
        """So many bytes of hidden states wait to be computed."""
        self._backlog += size
        self._held.backlog += size

    def computed(self, size: int) -> None:
        """So many bytes less."""
        self.took_in(-size)

    def release(self) -> None:
        """The session is over. Idempotent; nothing is taken in any more."""
        if not self._released:
            self._released = True
            self._held.sessions -= 1
            self._held.cache_tokens -= self._cache_tokens
            self.computed(self._backlog)
            self._admission._leave(self._held)


class Pace:
    """So many a second for long, so many at once after a pause; the rest wait for their turn."""

    def __init__(self, per_second: float, at_once: int) -> None:
        self._interval = 1 / per_second
        self._ahead = at_once * self._interval
        self._due = -math.inf
        """When the next one would come if they all came evenly."""

    def take(self, now: float, count: int = 1) -> float:
        """Seconds that the next one has to wait, or the next ``count`` together."""
        self._due = max(self._due, now - self._ahead) + count * self._interval
        return max(0.0, self._due - now)


class Bursts:
    """So many a second for long, but many at once and then long nothing."""

    def __init__(self, per_second: float, at_once: int) -> None:
        self._interval = 1 / per_second
        self._at_once = at_once
        self._left = 0
        """Of the burst that goes on."""
        self._begins = -math.inf
        self._paid = -math.inf
        """When all that went would have gone if it had gone evenly: the next burst begins then."""

    def take(self, now: float, count: int = 1) -> float:
        """Seconds that the next ``count`` together have to wait."""
        if self._left <= 0 or now > self._paid:
            self._left = self._at_once
            self._begins = max(now, self._paid)
        self._left -= count
        self._paid = max(self._begins, self._paid) + count * self._interval
        return max(0.0, self._begins - now)
