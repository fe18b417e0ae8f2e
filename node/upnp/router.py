"""What a router is asked (UPnP's WANIPConnection, over SOAP).

Rules of this file: what a router says is checked before it means anything; a value of ours is a number
or an address; whatever goes wrong is a ``RouterError``, and a refusal one with its code.
"""

from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from xml.etree.ElementTree import Element
from xml.sax.saxutils import escape

from .documents import named, parsed, text_of
from .errors import RouterError, RouterRefusal
from .exchange import Place, exchange

DESCRIPTION = "petals-node"
"""What our mappings are called in the router: nobody else's is touched."""
_SERVICES = (
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
)
_OK = 200
_ONLY_PERMANENT = 725
_REASON_LENGTH = 80
_INNER = tuple(map(IPv4Network, ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16")))
"""What a router has on its outer side if there is another one behind it."""


@dataclass(frozen=True)
class Entry:
    """A port that a router forwards, as it says."""

    host: str
    port: int
    description: str


@dataclass(frozen=True)
class Router:
    """One that forwards ports; ``router_at`` finds out."""

    control: Place
    service: str
    source: str
    """Our address on its inner side."""

    def __str__(self) -> str:
        return f"the router {self.control.host}"

    async def outer_address(self) -> str | None:
        """Its address on the outer side; None if that is one which nobody outside can dial."""
        answer = await self._ask("GetExternalIPAddress")
        try:
            address = IPv4Address(text_of(answer, "NewExternalIPAddress"))
        except AddressValueError:
            return None
        local = address.is_loopback or address.is_link_local
        nowhere = address.is_unspecified or address.is_multicast or address.is_reserved
        behind_another = any(address in network for network in _INNER)
        return None if local or nowhere or behind_another else str(address)

    async def entry(self, outer_port: int) -> Entry | None:
        """What that port is forwarded to; None: to nothing."""
        try:
            answer = await self._ask(
                "GetSpecificPortMappingEntry",
                NewRemoteHost="",
                NewExternalPort=str(outer_port),
                NewProtocol="TCP",
            )
        except RouterRefusal:  # most say 714, some that they don't know the question
            return None
        port = text_of(answer, "NewInternalPort")
        return Entry(
            text_of(answer, "NewInternalClient"),
            int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else 0,
            text_of(answer, "NewPortMappingDescription"),
        )

    async def forward(self, outer_port: int, inner_port: int, lease_seconds: int) -> None:
        """Have a port forwarded to us, for so long, or until told otherwise if it knows no leases."""
        try:
            await self._add(outer_port, inner_port, lease_seconds)
        except RouterRefusal as refusal:
            if refusal.code != _ONLY_PERMANENT:
                raise
            await self._add(outer_port, inner_port, 0)

    async def _add(self, outer_port: int, inner_port: int, lease_seconds: int) -> None:
        await self._ask(
            "AddPortMapping",
            NewRemoteHost="",
            NewExternalPort=str(outer_port),
            NewProtocol="TCP",
            NewInternalPort=str(inner_port),
            NewInternalClient=self.source,
            NewEnabled="1",
            NewPortMappingDescription=DESCRIPTION,
            NewLeaseDuration=str(lease_seconds),
        )

    async def forget(self, outer_port: int) -> None:
        """Have it forwarded no more."""
        await self._ask(
            "DeletePortMapping",
            NewRemoteHost="",
            NewExternalPort=str(outer_port),
            NewProtocol="TCP",
        )

    async def _ask(self, action: str, **values: str) -> Element:
        arguments = "".join(f"<{name}>{escape(text)}</{name}>" for name, text in values.items())
        envelope = (
            '<?xml version="1.0"?>\r\n'
            '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
            's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
            f'<u:{action} xmlns:u="{self.service}">{arguments}</u:{action}>'
            "</s:Body></s:Envelope>\r\n"
        )
        answer = await exchange(
            self.control,
            "POST",
            source=self.source,
            headers=[
                ("Content-Type", 'text/xml; charset="utf-8"'),
                ("SOAPAction", f'"{self.service}#{action}"'),
            ],
            body=envelope.encode(),
        )
        root = parsed(answer.body)
        if answer.status == _OK and next(named(root, f"{action}Response"), None) is not None:
            return root
        code = text_of(root, "errorCode")
        reason = text_of(root, "errorDescription")[:_REASON_LENGTH]
        if not code.isascii() or not code.isdecimal() or len(code) > 5:
            raise RouterError(f"it answers {action} with HTTP status {answer.status}")
        raise RouterRefusal(int(code), ascii(reason) if reason else "")


async def router_at(description: Place, source: str) -> Router:
    """The router that a description tells of. Raises RouterError if it forwards no ports."""
    answer = await exchange(description, "GET", source=source)
    if answer.status != _OK:
        raise RouterError(f"it answers with HTTP status {answer.status}")
    root = parsed(answer.body)
    controls = {
        text_of(service, "serviceType"): text_of(service, "controlURL")
        for service in named(root, "service")
    }
    for kind in _SERVICES:
        if kind in controls:
            base = text_of(root, "URLBase")
            place = description.joined(base) if base else description
            return Router(place.joined(controls[kind]), kind, source)
    raise RouterError("it has no service that forwards ports")
