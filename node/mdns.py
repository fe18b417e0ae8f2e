"""Finding peers on the local network without knowing any of them: mDNS, as printers are found.

What is told and asked for is a service of our own, ``_petals._udp.local.``, whose TXT record has the
addresses as libp2p's mDNS writes them (``dnsaddr=/ip4/…/p2p/…``). libp2p's own service name is left to
others: whatever speaks libp2p on a network would end up in our directory.

Rules of this file: the library runs threads of its own; all that comes from them goes through
``run_sync_soon`` and into a bounded table. Anybody on the network can say anything, so an address is
only ever a place to dial, and who is there has to prove it.
"""

import logging
import secrets
from collections.abc import Callable, Sequence

import trio
from zeroconf import (
    Error,
    IPVersion,
    ServiceBrowser,
    ServiceInfo,
    ServiceListener,
    Zeroconf,
)

logger = logging.getLogger(__name__)

_SERVICE = "_petals._udp.local."
_QUESTIONS = 3
_QUESTION_MILLISECONDS = 2000
_CLOSE_SECONDS = 1.0
_PEERS = 64  # on one network that are remembered
_ADDRESSES = 4  # of each
_ADDRESS_BYTES = 240  # a string of a TXT record has at most 255


class LanPeers:
    """Who else is on this network."""

    def __init__(self, found: Callable[[], None]) -> None:
        """``found`` is called when ``multiaddrs`` has become longer."""
        self._found = found
        self._multiaddrs: dict[str, tuple[str, ...]] = {}

    @property
    def multiaddrs(self) -> list[str]:
        """Of those who are there, each ending in ``/p2p/<peer id>``."""
        return [address for addresses in self._multiaddrs.values() for address in addresses]

    async def run(self, port: int, own: Sequence[str]) -> None:
        """Look for others, and tell ``own`` (none: only look), until cancelled. Raises nothing."""
        try:
            zeroconf = await trio.to_thread.run_sync(lambda: Zeroconf(ip_version=IPVersion.V4Only))
        except OSError as error:
            logger.info("no mDNS on this network: %s", error)
            return
        name = f"{secrets.token_hex(8)}.{_SERVICE}"
        listener = _Listener(name, trio.lowlevel.current_trio_token(), self._update)
        try:
            ServiceBrowser(zeroconf, _SERVICE, listener=listener)
            if own:
                info = _service(name, port, own)
                await trio.to_thread.run_sync(zeroconf.register_service, info)
            await trio.sleep_forever()
        except Error as error:
            logger.info("telling this network of us failed: %r", error)
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                await trio.to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)

    def _update(self, name: str, addresses: tuple[str, ...]) -> None:
        if not addresses:
            self._multiaddrs.pop(name, None)
        elif name in self._multiaddrs or len(self._multiaddrs) < _PEERS:
            self._multiaddrs[name] = addresses
            self._found()


class _Listener(ServiceListener):
    """What the library calls, in its own threads."""

    def __init__(
        self,
        own_name: str,
        token: trio.lowlevel.TrioToken,
        update: Callable[[str, tuple[str, ...]], None],
    ) -> None:
        self._own_name = own_name
        self._token = token
        self._update = update

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Somebody is there."""
        if name == self._own_name:
            return
        for _ in range(_QUESTIONS):  # packets get lost, and nobody asks again for minutes
            info = zc.get_service_info(type_, name, timeout=_QUESTION_MILLISECONDS)
            if info is not None:
                self._tell(name, _addresses_of(info))
                return

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """It says something else now."""
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:  # noqa: ARG002
        """It has left."""
        self._tell(name, ())

    def _tell(self, name: str, addresses: tuple[str, ...]) -> None:
        try:
            self._token.run_sync_soon(self._update, name, addresses)
        except trio.RunFinishedError:
            logger.debug("mDNS found %s after the end", name)


def _service(name: str, port: int, addresses: Sequence[str]) -> ServiceInfo:
    told = [address for address in addresses if len(address) <= _ADDRESS_BYTES][:_ADDRESSES]
    texts = {
        "dnsaddr" if number == 0 else f"dnsaddr{number + 1}": address
        for number, address in enumerate(told)
    }
    server = f"{name.partition('.')[0]}.local."
    hosts = [address.split("/")[2] for address in told if address.startswith("/ip4/")]
    return ServiceInfo(
        _SERVICE, name, port=port, properties=texts, server=server, parsed_addresses=hosts
    )


def _addresses_of(info: ServiceInfo) -> tuple[str, ...]:
    found = []
    for key, value in info.properties.items():
        if key.startswith(b"dnsaddr") and value is not None and len(value) <= _ADDRESS_BYTES:
            text = value.decode(errors="replace")
            if text.startswith("/") and text.isascii() and text.isprintable():
                found.append(text)
    return tuple(found[:_ADDRESSES])
