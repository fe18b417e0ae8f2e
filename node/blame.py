"""What a session's hops have done to it, told to the node's view of the swarm.

Who fails is avoided for a while, who has no room for as long as it said, and who sends what cannot be
is never used again: by this session and by all others of the node.
"""

import logging
from collections.abc import Callable

from ..protocol.errors import ErrorCode, PeerError, RemoteProtocolError
from ..protocol.frames import Failed, Refused
from ..protocol.swarm import Swarm

logger = logging.getLogger(__name__)

LEAVING_PAUSE = 10.0
"""Seconds for which a peer that says that it leaves is not asked again; it may come back."""


class LastWord(PeerError):
    """A hop has said why it does not take part, or not any more."""

    def __init__(self, frame: Failed | Refused, peer_id: str) -> None:
        super().__init__(frame.reason, code=frame.code, peer_id=peer_id)
        self.retry_after = frame.retry_after if isinstance(frame, Refused) else None


class Blame:
    """Judges peers for one session."""

    def __init__(self, swarm: Swarm, clock: Callable[[], float]) -> None:
        self._swarm = swarm
        self._clock = clock

    def judge(self, peer_id: str, error: PeerError | RemoteProtocolError) -> None:
        """A peer has ended its part in the session, or broken the protocol."""
        now = self._clock()
        if isinstance(error, RemoteProtocolError):
            logger.warning("peer %s is not used again: %s", peer_id, error)
            self._swarm.ban(peer_id)
        elif isinstance(error, LastWord) and error.retry_after is not None:
            self._swarm.refused(peer_id, now, error.retry_after)
        elif error.code is ErrorCode.LEAVING:
            self._swarm.refused(peer_id, now, LEAVING_PAUSE)
        else:
            self._swarm.failed(peer_id, now)

    def failed(self, peer_id: str) -> None:
        """A peer is gone, hangs, or is blamed by another."""
        self._swarm.failed(peer_id, self._clock())

    def served(self, peer_id: str) -> None:
        """A peer was a hop until the session's end."""
        self._swarm.succeeded(peer_id)
