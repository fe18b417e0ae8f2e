"""A port of the router in front of this machine, forwarded to it for as long as the node runs (UPnP).

Many home routers do that for whoever asks on their inner side. Rules of this file: a port that is
forwarded already is left alone, unless the entry has our name and is ours; what we were given is
renewed long before it ends, taken back when the node ends, and gone with its lease if it is killed;
whatever goes wrong means that nothing is forwarded, and is no error.

That a router agrees proves nothing, for there may be a second one behind it: whether others can dial us
is for them to say (``libp2p_dialback``).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from .errors import RouterError, RouterRefusal
from .exchange import Place
from .router import DESCRIPTION, Router, router_at
from .search import GROUP, search

logger = logging.getLogger(__name__)

_OTHER_PORTS = 4
"""How many are tried above the one that we listen on: a household may run several nodes."""
_LARGEST_PORT = 65535
_MOST_WAITING = 32  # routers that have answered, while the first one takes its time


@dataclass(frozen=True)
class ForwardingLimits:
    """Deadlines and pauses, in seconds."""

    search_seconds: float = 2.0
    """For routers to answer: they may take one, and are told so."""
    ask_seconds: float = 6.0
    """For all of it, however many answer, and whatever they do."""
    lease_seconds: int = 3600
    """A node that was killed leaves the port open for so long."""
    renew_seconds: float = 1200.0
    """A third of it; a router that was switched off has forgotten it sooner."""
    retry_seconds: float = 600.0
    """Until a node looks again that has found no router: laptops are carried about."""
    end_seconds: float = 1.0
    """For taking it back, when the node ends."""
    group: tuple[str, int] = GROUP
    """Where routers listen for the search."""


@dataclass(frozen=True)
class Forwarded:
    """What the router forwards to us."""

    port: int
    """On its outer side."""
    host: str | None
    """Its address there; None: one that nobody can dial."""


@dataclass(frozen=True)
class _Mapping:
    router: Router
    outer_port: int
    inner_port: int


class PortForwarding:
    """One TCP port, asked for and kept."""

    def __init__(
        self,
        inside: Callable[[], Sequence[tuple[str, int]]],
        changed: Callable[[], None],
        limits: ForwardingLimits,
    ) -> None:
        """``inside``: our addresses and ports that a router may forward to; none: it is not asked.

        ``changed`` is called whenever ``forwarded`` becomes another.
        """
        self._inside = inside
        self._changed = changed
        self._limits = limits
        self._mapping: _Mapping | None = None  # that may be in a router, whether it said so or not
        self._asked = trio.Event()
        self.forwarded: Forwarded | None = None
        """What a router has said that it forwards."""

    async def asked(self) -> None:
        """Return when it is known whether a router forwards our port."""
        await self._asked.wait()

    async def run(self) -> None:
        """Ask, and ask again, until cancelled."""
        try:
            while True:
                await self._ask()
                self._asked.set()
                kept = self.forwarded is not None
                await trio.sleep(self._limits.renew_seconds if kept else self._limits.retry_seconds)
        finally:
            await self._end()

    async def _ask(self) -> None:
        inside = self._inside()
        forwarded = None
        with trio.move_on_after(self._limits.ask_seconds):
            forwarded = await self._renewed(inside) or await self._found(inside)
        if forwarded != self.forwarded:
            self.forwarded = forwarded
            self._changed()

    async def _renewed(self, inside: Sequence[tuple[str, int]]) -> Forwarded | None:
        mapping = self._mapping
        if mapping is None or (mapping.router.source, mapping.inner_port) not in inside:
            return None
        try:
            return await self._forwarded_by(mapping.router, mapping.outer_port, mapping.inner_port)
        except RouterError as error:
            logger.info("%s: %s", mapping.router, error)
            return None

    async def _found(self, inside: Sequence[tuple[str, int]]) -> Forwarded | None:
        """Ask the routers that a search finds, one after another, until one agrees."""
        ports = dict(inside)
        forwarded = None
        async with trio.open_nursery() as nursery:
            sending, found = trio.open_memory_channel[tuple[str, Place]](_MOST_WAITING)
            async with sending:
                for source in ports:
                    nursery.start_soon(self._search, source, sending.clone())
            async for source, place in found:
                try:
                    router = await router_at(place, source)
                    forwarded = await self._forwarded_by(router, ports[source], ports[source])
                except RouterError as error:
                    logger.info("%s is no router for us: %s", place, error)
                if forwarded is not None:
                    nursery.cancel_scope.cancel()
                    break
        if ports and forwarded is None:
            logger.info("no router on this network forwards ports (UPnP)")
        return forwarded

    async def _search(
        self, source: str, sending: trio.MemorySendChannel[tuple[str, Place]]
    ) -> None:
        async with sending:
            with trio.move_on_after(self._limits.search_seconds):
                await search(source, self._limits.group, sending)

    async def _forwarded_by(
        self, router: Router, first_port: int, inner_port: int
    ) -> Forwarded | None:
        """A port that the router forwards to us now: the first one, or one a little above it.

        Raises RouterError if it does not answer as it should.
        """
        last = min(first_port + _OTHER_PORTS, _LARGEST_PORT)
        for outer_port in range(first_port, last + 1):
            try:
                taken = await self._take(router, outer_port, inner_port)
            except RouterRefusal as refusal:
                logger.info("%s does not forward port %d: %s", router, outer_port, refusal)
                continue
            if taken:
                return Forwarded(outer_port, await _outer_address(router))
        return None

    async def _take(self, router: Router, outer_port: int, inner_port: int) -> bool:
        entry = await router.entry(outer_port)
        if entry is not None and entry.description != DESCRIPTION:
            already = (entry.host, entry.port) == (router.source, inner_port)
            if already:
                logger.info("%s forwards port %d to us for good", router, outer_port)
            return already
        if entry is not None and (entry.host, entry.port) != (router.source, inner_port):
            return False  # another node's
        self._mapping = _Mapping(router, outer_port, inner_port)
        try:
            await router.forward(outer_port, inner_port, self._limits.lease_seconds)
        except RouterRefusal:
            self._mapping = None
            raise
        logger.info("%s says that it forwards port %d to us", router, outer_port)
        return True

    async def _end(self) -> None:
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        with trio.move_on_after(self._limits.end_seconds, shield=True):
            try:
                await mapping.router.forget(mapping.outer_port)
            except RouterError as error:
                logger.info("%s keeps port %d open: %s", mapping.router, mapping.outer_port, error)


async def _outer_address(router: Router) -> str | None:
    try:
        return await router.outer_address()
    except RouterError as error:
        logger.info("%s does not say its outer address: %s", router, error)
        return None
