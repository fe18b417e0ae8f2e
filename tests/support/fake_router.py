"""A router that forwards ports for whoever asks (UPnP), as far as a node can tell.

It answers searches over UDP, has a description, and does what it is asked over SOAP; what it is to do
otherwise is set in its fields. What it really forwards is for ``applied`` to see to.
"""

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

SEARCHED = ("239.255.255.250", 1900)
WAN_IP = "urn:schemas-upnp-org:service:WANIPConnection:1"
_GATEWAY = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
_REASONS = {714: "NoSuchEntryInArray", 718: "ConflictInMappingEntry"}


@dataclass(frozen=True)
class Forward:
    """An entry of its table."""

    host: str
    port: int
    description: str = "somebody"
    lease: int = 0


@dataclass
class FakeRouter:
    """Run ``serve`` in a nursery."""

    host: str = "127.0.0.1"
    outer_host: str = "203.0.113.10"
    table: dict[int, Forward] = field(default_factory=dict)
    """What it forwards, by outer port."""
    leases: bool = True
    """Whether it knows any; else it forwards for good only."""
    refusals: dict[str, int] = field(default_factory=dict)
    """Codes of the actions that it refuses."""
    description: bytes | None = None
    """The HTTP answer when its description is asked for; None: a proper one."""
    location: str | None = None
    """Where its description is, as it says; None: where it is."""
    rival: str | None = None
    """Where another device's is, that answers searches sooner."""
    applied: Callable[[dict[int, Forward]], None] = lambda table: None
    asked: list[str] = field(default_factory=list)
    """The actions that it was asked for."""
    searched_at: tuple[str, int] = ("", 0)
    """Where it listens for searches, when it does."""

    async def serve(
        self,
        *,
        multicast: bool = False,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Until cancelled; searched for at UPnP's address, or at a free port of its own."""
        [listener] = await trio.open_tcp_listeners(0, host=self.host)
        here = f"http://{self.host}:{listener.socket.getsockname()[1]}/description.xml"
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hearing:
            if multicast:
                hearing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                await hearing.bind(("", SEARCHED[1]))
                membership = socket.inet_aton(SEARCHED[0]) + socket.inet_aton(self.host)
                hearing.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
                self.searched_at = SEARCHED
            else:
                await hearing.bind((self.host, 0))
                self.searched_at = hearing.getsockname()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, self._converse, [listener])
                task_status.started()
                while True:
                    question, asker = await hearing.recvfrom(2048)
                    if question.startswith(b"M-SEARCH") and _GATEWAY.encode() in question:
                        for url in filter(None, (self.rival, self.location or here)):
                            answer = f"HTTP/1.1 200 OK\r\nST: {_GATEWAY}\r\nLocation: {url}\r\n\r\n"
                            await hearing.sendto(answer.encode(), asker)

    async def _converse(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                request = b""
                while (length := _length(request)) is None or len(request) < length:
                    piece = await stream.receive_some()
                    if not piece:
                        return
                    request += piece
                await stream.send_all(self._answer(request.decode()))
        except trio.BrokenResourceError:  # whoever asked has heard enough
            return

    def _answer(self, request: str) -> bytes:
        if request.startswith("GET"):
            return self.description or http(description())
        action = re.search(rf'"{re.escape(WAN_IP)}#(\w+)"', request)
        assert action is not None, request
        self.asked.append(action[1])
        fields = dict(re.findall(r"<(New\w+)>([^<]*)</", request))
        code, answer = self._done(action[1], fields)
        code = self.refusals.get(action[1], code)
        if code:
            reason = _REASONS.get(code, "")
            return http(
                f"<s:Fault><errorCode>{code}</errorCode>"
                f"<errorDescription>{reason}</errorDescription></s:Fault>",
                status=500,
            )
        return http(f"<u:{action[1]}Response xmlns:u='{WAN_IP}'>{answer}</u:{action[1]}Response>")

    def _done(self, action: str, fields: dict[str, str]) -> tuple[int, str]:
        """UPnP's error code, 0 for none, and the answer."""
        outer = int(fields.get("NewExternalPort", 0))
        entry = self.table.get(outer)
        match action:
            case "GetExternalIPAddress":
                return 0, f"<NewExternalIPAddress>{self.outer_host}</NewExternalIPAddress>"
            case "GetSpecificPortMappingEntry" if entry is not None:
                return 0, (
                    f"<NewInternalPort>{entry.port}</NewInternalPort>"
                    f"<NewInternalClient>{entry.host}</NewInternalClient>"
                    f"<NewPortMappingDescription>{entry.description}</NewPortMappingDescription>"
                )
            case "AddPortMapping":
                lease = int(fields["NewLeaseDuration"])
                client = fields["NewInternalClient"]
                if lease and not self.leases:
                    return 725, ""
                if entry is not None and entry.host != client:
                    return 718, ""
                port, name = int(fields["NewInternalPort"]), fields["NewPortMappingDescription"]
                self.table[outer] = Forward(client, port, name, lease)
            case "DeletePortMapping" if entry is not None:
                del self.table[outer]
            case _:
                return 714, ""
        self.applied(self.table)
        return 0, ""


def description(control: str = "/control", kind: str = WAN_IP) -> str:
    """The description of a router whose ports are asked for there."""
    return (
        "<device><serviceList>"
        "<service><serviceType>urn:schemas-upnp-org:service:Layer3Forwarding:1</serviceType>"
        "<controlURL>/other</controlURL></service>"
        f"<service><serviceType>{kind}</serviceType><controlURL>{control}</controlURL></service>"
        "</serviceList></device>"
    )


def http(inner: str, *, status: int = 200) -> bytes:
    """An answer with XML around it."""
    body = (
        "<?xml version='1.0'?><s:Envelope xmlns:s='http://schemas.xmlsoap.org/soap/envelope/'>"
        f"<s:Body>{inner}</s:Body></s:Envelope>"
    ).encode()
    head = f"HTTP/1.1 {status} So\r\nContent-Type: text/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _length(request: bytes) -> int | None:
    """How long the whole request is, once its head is there."""
    head, end, _ = request.partition(b"\r\n\r\n")
    if not end:
        return None
    told = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    return len(head) + len(end) + (int(told[1]) if told else 0)
