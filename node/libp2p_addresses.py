"""Multiaddrs, as users write them, as sockets are bound, and as other nodes are told.

Rules of this file: an address that a user wrote and that cannot be right is a ``ConfigError`` which
names it and shows how to write it; one that a peer sent and that makes no sense is passed over.
"""

import errno
import logging
import os
import socket
from collections.abc import Sequence
from ipaddress import ip_address

import psutil
import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from ..protocol.errors import ConfigError
from .libp2p_sockets import Listener

logger = logging.getLogger(__name__)


def parse_peer_multiaddr(text: str) -> tuple[ID, Multiaddr]:
    """The peer id and the address of ``/ip4/…/tcp/…/p2p/<peer id>``; ConfigError otherwise."""
    address = parse_multiaddr(text, "bootstrap")
    peer_id = address.get_peer_id()
    if not peer_id:
        raise ConfigError(
            f"{text!r} does not say which peer is there: a bootstrap address ends in "
            "/p2p/<peer id>, as the peer prints it when it starts"
        )
    return ID.from_string(peer_id), address


def announced_addresses(bound: Sequence[Multiaddr]) -> list[Multiaddr]:
    """What to tell others for the addresses that our sockets are bound to.

    A wildcard stands for the machine's real interfaces (loopback only if there is nothing else):
    announced literally, it would make others dial themselves.
    """
    addresses: dict[Multiaddr, None] = {}
    for address in bound:
        family = "ip4" if _value(address, "ip4") else "ip6"
        if ip_address(_value(address, family) or "").is_unspecified:
            for host in _interface_hosts(family):
                addresses[Multiaddr(f"/{family}/{host}/tcp/{_value(address, 'tcp')}")] = None
        else:
            addresses[address] = None
    return list(addresses)


def is_loopback(address: Multiaddr) -> bool:
    """Whether only this machine can dial the address."""
    return ip_address(_value(address, "ip4") or _value(address, "ip6") or "").is_loopback


def interface_hosts() -> set[str]:
    """All IP addresses of this machine, in their shortest form."""
    return {
        str(ip_address(address.address.partition("%")[0]))
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }


def _interface_hosts(family: str) -> list[str]:
    wanted = socket.AF_INET if family == "ip4" else socket.AF_INET6
    hosts = [
        ip_address(address.address.partition("%")[0])
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == wanted
    ]
    real = [host for host in hosts if not host.is_loopback and not host.is_link_local]
    return [str(host) for host in (real or [host for host in hosts if host.is_loopback])]


async def bind(addresses: Sequence[Multiaddr]) -> list[Listener]:
    """Listening sockets for the addresses; ConfigError, and none, if one cannot be bound."""
    listeners: list[Listener] = []
    try:
        for address in addresses:
            host = _value(address, "ip4") or _value(address, "ip6")
            port = int(_value(address, "tcp") or 0)
            sockets = await trio.open_tcp_listeners(port, host=host)
            for listener in sockets:
                # for dialling from this port; set only now, nobody else can listen on it
                listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listeners.append(Listener(sockets))
    except OSError as error:
        for opened in listeners:
            await opened.close()
        advice = {
            errno.EADDRINUSE: "stop what listens there, or choose another port (/tcp/0 lets the "
            "system choose)",
            errno.EACCES: "choose a port above 1023",
            errno.EADDRNOTAVAIL: "choose an address of this machine, or /ip4/0.0.0.0 for all",
        }.get(error.errno or 0, "choose another address")
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"cannot listen on {address}: {reason.lower()}; {advice}") from error
    return listeners


def parse_listen_multiaddr(text: str) -> Multiaddr:
    """An address to listen on; ConfigError if it cannot be one."""
    address = parse_multiaddr(text, "listen")
    if [protocol.name for protocol in address.protocols()] not in (["ip4", "tcp"], ["ip6", "tcp"]):
        raise ConfigError(
            f"cannot listen on {text!r}: write /ip4/<address>/tcp/<port> or "
            "/ip6/<address>/tcp/<port>, such as /ip4/0.0.0.0/tcp/0"
        )
    return address


def parse_multiaddr(text: str, what: str) -> Multiaddr:
    """An address that the user gave as ``what``; ConfigError if it is none."""
    try:
        return Multiaddr(text)
    except Exception as error:
        raise ConfigError(
            f"the {what} address {text!r} is not a multiaddr ({error}); write it as "
            "/ip4/<address>/tcp/<port>" + ("/p2p/<peer id>" if what == "bootstrap" else "")
        ) from error


def readable_multiaddr(text: str) -> Multiaddr | None:
    """An address that a peer announced, or None if it makes no sense: others of it may."""
    try:
        return Multiaddr(text)
    except Exception as error:  # noqa: BLE001 - the parser raises a dozen kinds
        logger.debug("an address that cannot be read: %r", error)
        return None


def _value(address: Multiaddr, protocol: str) -> str | None:
    names = [part.name for part in address.protocols()]
    return address.value_for_protocol(protocol) if protocol in names else None
