"""One HTTP request to a router, and the answer to it.

What answers may be any device on the network, and broken or hostile. Rules of this file: an address is
one in numbers, so that nothing is looked up; a redirection is not followed; the answer has as many
bytes as it may and all of it comes in time, or it is a ``RouterError``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address
from urllib.parse import urljoin, urlsplit

import h11
import trio

from .errors import RouterError

EXCHANGE_SECONDS = 2.0
"""For one request: routers are a cable away, but their processors are slow."""
_HEAD_BYTES = 8 * 1024
_BODY_BYTES = (
    64 * 1024
)  # the longest real descriptions, of devices with a dozen services, have 20 KB
_READ_BYTES = 8 * 1024
_TARGET = re.compile(r"/[!-~]{0,511}")


@dataclass(frozen=True)
class Place:
    """Where something is asked: an address on our network, and what of it."""

    host: str
    port: int
    target: str

    def __str__(self) -> str:
        return f"http://{self.host}:{self.port}{self.target}"

    def joined(self, url: str) -> "Place":
        """Where ``url`` is, which a document from here names; it must be the same machine.

        Raises RouterError.
        """
        return place_at(self.host, _joined(str(self), url))


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    body: bytes


def place_at(host: str, url: str) -> Place:
    """The place that ``url`` names, if that is at ``host``. Raises RouterError.

    Else whoever answers could make us ask machines that it cannot reach, in our name.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or 80
        same = parts.scheme == "http" and IPv4Address(parts.hostname or "") == IPv4Address(host)
    except (AddressValueError, ValueError) as error:
        raise RouterError(f"it names an address that makes no sense ({url[:80]!r})") from error
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not same:
        raise RouterError(f"it names an address that is not its own ({url[:80]!r})")
    if not _TARGET.fullmatch(target):
        raise RouterError("it names an address that is too long, or has odd letters")
    return Place(host, port, target)


async def exchange(
    place: Place,
    method: str,
    *,
    source: str,
    headers: Sequence[tuple[str, str]] = (),
    body: bytes = b"",
) -> Answer:
    """Ask at ``place``, from our address ``source``. Raises RouterError."""
    try:
        with trio.fail_after(EXCHANGE_SECONDS):
            return await _exchange(place, method, source, headers, body)
    except trio.TooSlowError:
        raise RouterError(f"no whole answer within {EXCHANGE_SECONDS:g} s") from None
    except (OSError, trio.BrokenResourceError) as error:
        raise RouterError(f"cannot ask {place}: {error}") from error
    except h11.ProtocolError as error:
        raise RouterError(f"it answers what is not HTTP ({error})") from error


async def _exchange(
    place: Place, method: str, source: str, headers: Sequence[tuple[str, str]], body: bytes
) -> Answer:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES)
    request = h11.Request(
        method=method,
        target=place.target,
        headers=[
            ("Host", f"{place.host}:{place.port}"),
            ("Connection", "close"),
            ("Content-Length", str(len(body))),
            *headers,
        ],
    )
    parts = [connection.send(event) for event in (request, h11.Data(body), h11.EndOfMessage())]
    stream = await trio.open_tcp_stream(place.host, place.port, local_address=source)
    async with stream:
        await stream.send_all(b"".join(part or b"" for part in parts))
        status, received = 0, bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some(_READ_BYTES))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                received += event.data
                if len(received) > _BODY_BYTES:
                    raise RouterError(f"its answer is longer than {_BODY_BYTES} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return Answer(status, bytes(received))


def _joined(base: str, url: str) -> str:
    try:
        return urljoin(base, url)
    except ValueError as error:
        raise RouterError(f"it names an address that makes no sense ({url[:80]!r})") from error
