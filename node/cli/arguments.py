"""What the command line's arguments mean, and what is wrong with them, in words.

Rules of this file: pure functions from text to values; every complaint is a ``ConfigError`` of one
line that names the option and says what to write instead. Nothing here imports torch or libp2p,
so that bad input is answered at once.
"""

import ipaddress
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...protocol.admission import AdmissionLimits
from ...protocol.errors import ConfigError
from ...protocol.span import Span
from ..api.config import ApiConfig, parse_address
from ..config import BOOTSTRAP_VARIABLE

_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{40,80}")
_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_DIALLED = "/ip4/ADDRESS/tcp/PORT/p2p/PEER_ID, as that peer prints it when it serves"
_LISTENED = "/ip4/ADDRESS/tcp/PORT, for example /ip4/0.0.0.0/tcp/0 (0 is any free port)"


def parse_blocks(text: str | None) -> Span | None:
    """Read ``--blocks START:END``."""
    if text is None:
        return None
    try:
        return Span.parse(text)
    except ValueError as error:
        raise ConfigError(f"--blocks: {error}") from error


def check_peer_multiaddr(text: str) -> str:
    """Return the address of a peer to dial if it is well-formed: a host, a port, a peer id."""
    parts = _split(text, "--bootstrap", _DIALLED)
    if len(parts) != 6 or parts[4] not in ("p2p", "ipfs"):
        raise ConfigError(f"--bootstrap: {text!r} names no peer; write {_DIALLED}")
    if _PEER_ID.fullmatch(parts[5]) is None:
        raise ConfigError(f"--bootstrap: {parts[5]!r} is not a peer id; write {_DIALLED}")
    _check_host_and_port(text, parts, "--bootstrap", _DIALLED)
    if parts[3] == "0":
        raise ConfigError(f"--bootstrap: nobody can be dialled at port 0; write {_DIALLED}")
    return text


def check_listen_multiaddr(text: str) -> str:
    """Return the address to listen at if it is well-formed: a host and a port."""
    return _check_host_port(text, "--listen")


def _check_host_port(text: str, option: str) -> str:
    parts = _split(text, option, _LISTENED)
    if len(parts) != 4:
        raise ConfigError(f"{option}: {text!r} is more than a host and a port; write {_LISTENED}")
    _check_host_and_port(text, parts, option, _LISTENED)
    return text


def _split(text: str, option: str, pattern: str) -> list[str]:
    """The components of a multiaddr: protocol, value, protocol, value, …"""
    parts = text.split("/")
    if not text.startswith("/") or len(parts) < 5 or not all(parts[1:]):
        raise ConfigError(f"{option}: {text!r} is not a multiaddr; write {pattern}")
    return parts[1:]


def _check_host_and_port(text: str, parts: Sequence[str], option: str, pattern: str) -> None:
    kind, host, transport, port = parts[:4]
    if kind in ("ip4", "ip6"):
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            address = None
        if address is None or address.version != int(kind[-1]):
            raise ConfigError(f"{option}: {host!r} is not an {kind} address; write {pattern}")
    elif kind not in ("dns", "dns4", "dns6"):
        raise ConfigError(f"{option}: {text!r} begins with no ip4, ip6 or dns; write {pattern}")
    elif _HOST_NAME.fullmatch(host) is None:
        raise ConfigError(f"{option}: {host!r} is not a host name; write {pattern}")
    if transport != "tcp":
        raise ConfigError(f"{option}: only tcp is spoken, not {transport!r}; write {pattern}")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(f"{option}: {port!r} is not a port from 0 to 65535; write {pattern}")


def bootstrap_peers(given: Sequence[str] | None) -> tuple[str, ...]:
    """The bootstrap peers that are named; maybe none."""
    return tuple(check_peer_multiaddr(text) for text in given or ())


def some_bootstrap_peers(given: Sequence[str] | None) -> tuple[str, ...]:
    """The bootstrap peers, of which there must be one: a command that originates needs a swarm."""
    peers = bootstrap_peers(given)
    if not peers:
        raise ConfigError(
            f"no way into a swarm: name a peer with --bootstrap {_DIALLED}, or several in the "
            f"environment variable {BOOTSTRAP_VARIABLE}, or look on the local network with --mdns; "
            "`petals-node run` starts a swarm of your own and `petals-node demo` shows one"
        )
    return peers


def listen_addresses(given: Sequence[str] | None) -> tuple[str, ...]:
    """The addresses of ``--listen``; empty when the default is wanted."""
    return tuple(check_listen_multiaddr(text) for text in given or ())


def announced_addresses(given: Sequence[str] | None) -> tuple[str, ...]:
    """The addresses of ``--announce``; empty when others are to dial what is listened on."""
    return tuple(_check_host_port(text, "--announce") for text in given or ())


def check_data_dir(path: Path) -> Path:
    """Make the data directory if need be, and make sure that it can be written to."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the data directory {path}: {error.strerror}; choose another with "
            "--data-dir"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(
            f"no permission to write to the data directory {path}; choose another with --data-dir"
        )
    return path


def check_positive(value: int | None, option: str) -> int | None:
    """Return a count that must be at least one, if it was given."""
    if value is not None and value < 1:
        raise ConfigError(f"{option}: {value} is too few; write a number from 1 upwards")
    return value


def admission_limits(**given: Any) -> AdmissionLimits:
    """What other peers may have; each option is called as its field is."""
    try:
        return AdmissionLimits(**given)
    except ConfigError as error:
        field, _, rest = str(error).partition(":")
        raise ConfigError(f"--{field.replace('_', '-')}:{rest}") from error


def api_config(
    address: str,
    key: str | None,
    cors_origins: Sequence[str] | None,
    *,
    max_requests: int,
    max_body_mib: int,
) -> ApiConfig:
    """Where the API is, and for whom."""
    host, port = parse_address(address)
    check_positive(max_requests, "--api-requests")
    check_positive(max_body_mib, "--api-body")
    return ApiConfig(
        host=host,
        port=port,
        key=key,
        cors_origins=tuple(cors_origins or ()),
        max_requests=max_requests,
        max_body_mib=max_body_mib,
    )


def split_evenly(num_blocks: int, num_nodes: int) -> list[Span]:
    """Spans of nearly equal length, in order, that together hold all blocks once."""
    if not 1 <= num_nodes <= num_blocks:
        raise ConfigError(
            f"--nodes: the model has {num_blocks} blocks, so between 1 and {num_blocks} nodes can "
            f"serve them, not {num_nodes}"
        )
    bounds = [round(index * num_blocks / num_nodes) for index in range(num_nodes + 1)]
    return [Span(start, end) for start, end in pairwise(bounds)]
