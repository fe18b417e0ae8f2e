"""Finding routers on the networks that this machine is in (SSDP).

A question goes to a multicast address that routers listen at; each answers with the address of its
description. Rules of this file: an answer counts only from a neighbour, not from a global address; it
may point only at the machine that it comes from; and after ``_MOST_ROUTERS`` nobody else is heard.
"""

import logging
import socket
from ipaddress import IPv4Address

import trio

from .errors import RouterError
from .exchange import Place, place_at

logger = logging.getLogger(__name__)

GROUP = ("239.255.255.250", 1900)
_WANTED = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
)
_ANSWER_BYTES = 2048
_MOST_ROUTERS = 8
_HOPS = 2  # as UPnP has it
_REPEAT_SECONDS = 0.5  # packets get lost in wireless networks


async def search(
    source: str, group: tuple[str, int], found: trio.MemorySendChannel[tuple[str, Place]]
) -> None:
    """Look around from our address ``source``, until cancelled; sends it with what is ``found``."""
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, _HOPS)
            asking.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(source))
            await asking.bind((source, 0))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_ask_again_and_again, asking, group)
                await _listen(asking, source, found)
                nursery.cancel_scope.cancel()
        except* OSError as group_of_errors:  # no multicast there, or the interface is gone
            logger.debug("no search for routers from %s: %s", source, group_of_errors.exceptions)


async def _ask_again_and_again(asking: trio.socket.SocketType, group: tuple[str, int]) -> None:
    while True:
        for wanted in _WANTED:
            question = (
                f"M-SEARCH * HTTP/1.1\r\nHOST: {group[0]}:{group[1]}\r\n"
                f'MAN: "ssdp:discover"\r\nMX: 1\r\nST: {wanted}\r\n\r\n'
            )
            await asking.sendto(question.encode(), group)
        await trio.sleep(_REPEAT_SECONDS)


async def _listen(
    asking: trio.socket.SocketType,
    source: str,
    found: trio.MemorySendChannel[tuple[str, Place]],
) -> None:
    places: set[Place] = set()
    while len(places) < _MOST_ROUTERS:
        answer, (host, _) = await asking.recvfrom(_ANSWER_BYTES)
        try:
            place = _place_in(answer, host)
        except RouterError as error:
            logger.debug("%s answers the search for routers: %s", host, error)
            continue
        if place not in places:
            places.add(place)
            await found.send((source, place))


def _place_in(answer: bytes, host: str) -> Place:
    if IPv4Address(host).is_global:
        raise RouterError("it is no neighbour")
    status, *lines = answer.decode("latin-1").split("\r\n")
    if not status.startswith("HTTP/1.1 200"):
        raise RouterError("it does not answer as a router does")
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines)
    }
    return place_at(host, headers.get("location", ""))
