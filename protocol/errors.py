"""Every error that a user or a peer can meet, and the codes that travel on the wire.

Rules of this file: an error says whose fault it is. ``LocalProtocolError`` is a bug or a misuse on
our side, ``RemoteProtocolError`` is a peer that broke the protocol; both are translated from
lower-level errors at one border. What a user of the package may want to catch derives from
``PetalsError`` and has a message that says what was wrong and what to do about it.
"""

from collections.abc import Sequence
from enum import StrEnum

from .span import Span


class ErrorCode(StrEnum):
    """What a ``refused`` or ``failed`` frame says; unknown codes of newer peers become OTHER."""

    BUSY = "busy"
    """No cache left for the session; the frame's ``retry_after`` says when to ask again."""
    LEAVING = "leaving"
    """The node is shutting down and takes no new sessions."""
    WRONG_MODEL = "wrong_model"
    """The node serves a model with another fingerprint."""
    WRONG_SPAN = "wrong_span"
    """The node does not serve all of the blocks asked for."""
    BAD_REQUEST = "bad_request"
    """The frame is well-formed, but what it asks for cannot be (sizes, shapes, positions)."""
    UNKNOWN_SESSION = "unknown_session"
    """The node holds no such session, or not for this peer."""
    UNREACHABLE = "unreachable"
    """A hop could not reach or lost its successor."""
    COMPUTE = "compute"
    """The forward pass itself failed (out of memory, a device error)."""
    PROTOCOL = "protocol"
    """The peer broke the protocol."""
    TIMEOUT = "timeout"
    """A deadline passed."""
    OTHER = "other"

    @classmethod
    def parse(cls, text: str) -> "ErrorCode":
        """The code named by ``text``, or OTHER: a newer peer may know more codes than we do."""
        try:
            return cls(text)
        except ValueError:
            return cls.OTHER


class PetalsError(Exception):
    """Base of every error that this package raises on purpose."""


class ProtocolError(PetalsError):
    """The protocol was broken, by us (Local…) or by the peer (Remote…)."""


class LocalProtocolError(ProtocolError):
    """We were about to do something that the protocol forbids: a bug or a misuse of the API."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol forbids."""


class PeerError(PetalsError):
    """A peer refused, failed, or could not be reached."""

    def __init__(
        self, message: str, *, code: ErrorCode = ErrorCode.OTHER, peer_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.peer_id = peer_id


class ModelError(PetalsError):
    """A model cannot be found, read or run: wrong path, missing or corrupt shard, bad span."""


class ModelMismatch(PetalsError):
    """The peers serve a model of that name with other weights or another configuration."""


class CacheFull(PetalsError):
    """A session does not fit into the KV cache that is left.

    ``retry_after`` is in seconds; None when it would never fit.
    """

    def __init__(self, message: str, *, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NoRoute(PetalsError):
    """No chain of peers covers the model. ``missing`` holds the spans that nobody serves."""

    def __init__(self, message: str, *, missing: Sequence[Span] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class ConfigError(PetalsError, ValueError):
    """A setting or an argument is out of range; the message names it and says what is allowed."""
