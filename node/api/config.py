"""What the HTTP API can be told: one frozen, validated value. Imports nothing that is slow."""

import ipaddress
import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ...protocol.errors import ConfigError

API_KEY_VARIABLE = "PETALS_API_KEY"
DEFAULT_ADDRESS = "127.0.0.1:8080"
_WRITTEN = "write HOST:PORT, for example 127.0.0.1:8080 (port 0 is any free one)"


def api_key_from_environment() -> str | None:
    """The key in ``$PETALS_API_KEY``."""
    return os.environ.get(API_KEY_VARIABLE) or None


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """Where to listen and what to allow. Raises ConfigError when that cannot be."""

    host: str = "127.0.0.1"
    """An address of this machine, or a name of one."""
    port: int = 8080
    """0 takes a free one."""
    key: str | None = field(default_factory=api_key_from_environment, repr=False)
    """What clients have to know. None: who reaches a loopback address may ask; others cannot."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may ask, too (``https://chat.example``; ``*`` is every page)."""
    max_requests: int = 128
    """Generations at a time: each is a session of this node, which every hop holds cache for."""
    max_body_mib: int = 4
    """MiB of a request: several times the longest prompt that any model takes."""

    @property
    def max_body(self) -> int:
        """Bytes of a request."""
        return self.max_body_mib * 1024 * 1024

    def __post_init__(self) -> None:
        if self.key is not None and not (
            self.key.isascii() and self.key.isprintable() and self.key
        ):
            raise ConfigError("--api-key: must be printable ASCII characters, at least one")
        if self.key is None and not is_loopback(self.host):
            raise ConfigError(
                f"--api: {self.host} can be reached from other machines, so a key is needed: give one "
                f"with --api-key or in the environment variable {API_KEY_VARIABLE}, or listen on "
                "127.0.0.1"
            )
        if self.max_requests < 1:
            raise ConfigError(f"--api-requests: must be at least 1, got {self.max_requests}")
        if self.max_body_mib < 1:
            raise ConfigError(f"--api-body: must be at least 1, got {self.max_body_mib}")
        for origin in self.cors_origins:
            parts = urlsplit(origin)
            whole = f"{parts.scheme}://{parts.netloc}"
            if origin != "*" and (not parts.scheme or not parts.netloc or origin != whole):
                raise ConfigError(
                    f"--cors-origin: {origin!r} is no origin; write https://HOST, or * for every page"
                )


def parse_address(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT``. Raises ConfigError."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.netloc != text or parts.username is not None:
        raise ConfigError(f"--api: {text!r} is no address to listen on; {_WRITTEN}")
    return host, port


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
