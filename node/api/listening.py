"""The socket of the API: bound before anything slow begins, so that a port in use is told at once."""

import os
import socket

from ...protocol.errors import ConfigError
from .config import ApiConfig

BACKLOG = 128
UNREAD_TIMEOUT = 60
"""Seconds that a client may leave unread what the kernel holds for it, before it counts as gone."""


def listen(config: ApiConfig) -> socket.socket:
    """A socket that listens where the API is to be. Raises ConfigError."""
    try:
        family, *_, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_TIMEOUT * 1000)
            listening.bind(address)
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise ConfigError(
            f"--api: cannot listen on {config.host} port {config.port} ({reason}); choose another with "
            "--api HOST:PORT"
        ) from error
    return listening


def page_url(listening: socket.socket) -> str:
    """Where people find ``listening`` with a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def url(listening: socket.socket) -> str:
    """What a client has to be told of ``listening``: its base URL."""
    return page_url(listening) + "v1"
