"""Finding out whether others can dial this node, and being reached through relays if they cannot.

The router, if there is one, is asked to forward our port (``upnp``). Whoever has dialled us can; who
was dialled by us is asked to dial back (``libp2p_dialback``). The answers are judged by
``reachability.verdict``. A node that nobody can dial reserves places at relays (``libp2p_circuits``), stops relaying and holding the directory for others, and announces
circuit addresses only; one that can be dialled relays for others (``libp2p_relay``).

Rules of this file: what the user insists on is never doubted, and no router is asked then; an address
that a router gives us is told to others when a peer has reached us there, or while no peer beyond the
router can say; a node that was reachable must be
found unreachable twice before it changes its addresses; ``news`` tells whenever something that
others should know has changed.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address

import trio
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from .libp2p_addresses import announced_addresses, interface_hosts, is_loopback
from .libp2p_circuits import CircuitLimits, CircuitTransport, Reservations
from .libp2p_dialback import AUTONAT, DialBack, DialBackLimits, host_of
from .libp2p_host import GuardedHost
from .libp2p_relay import HOP, STOP, CircuitRelay, RelayLimits
from .libp2p_swarm import GuardedSwarm
from .libp2p_yamux import yamux_of
from .reachability import Reach, Reachability, Vote, verdict
from .upnp.forwarding import ForwardingLimits, PortForwarding
from .wakeup import Signal

logger = logging.getLogger(__name__)

_VOTERS = 3  # peers that are asked to dial back
_UNKNOWN_SECONDS = 10.0  # until the next look, while there is nobody to ask
_DOUBT_SECONDS = 10.0  # until a node that was reachable looks again
_KNOWN_SECONDS = 300.0


class ReachabilityKeeper:
    """This node's reachability: found out, kept, told."""

    def __init__(
        self,
        host: GuardedHost,
        swarm: GuardedSwarm,
        *,
        wanted: str,
        bound: Callable[[], Sequence[Multiaddr]],
        direct: Callable[[], Sequence[Multiaddr]],
        relays: Sequence[tuple[ID, Multiaddr]],
        hold_directory: Callable[[bool], None],
        clock: Callable[[], float],
        relay_limits: RelayLimits,
        circuit_limits: CircuitLimits,
        dial_back_limits: DialBackLimits,
        forwarding_limits: ForwardingLimits | None,
        punched: Callable[[ID], bool],
    ) -> None:
        """``relays`` are tried before others; who was ``punched`` to says nothing about us.

        ``forwarding_limits``: None if no router is to be asked to forward our port; ``wanted``: what
        the user insists on, or ``auto``; ``bound``: what our sockets listen on;
        ``direct``: what others are told when they can dial us.
        """
        self._host = host
        self._swarm = swarm
        self._wanted = wanted
        self._bound = bound
        self._direct = direct
        self._first_relays = tuple(relays)
        self._hold_directory = hold_directory
        self._reach = Reach.UNKNOWN if wanted == "auto" else Reach(wanted)
        self._outside: dict[Multiaddr, None] = {}  # where peers beyond a router have dialled us
        self._punched = punched
        self._asks_routers = forwarding_limits is not None and wanted == "auto"
        self._forwarding = PortForwarding(
            self._inside, self._forwarding_changed, forwarding_limits or ForwardingLimits()
        )
        self._forwarded_otherwise = Signal()
        self._settled = trio.Event()
        self._met = Signal()
        self.news = Signal()
        self.relay = CircuitRelay(swarm, self.addresses, clock, relay_limits)
        self._reservations = Reservations(
            swarm, self._candidates, self._changed, clock, circuit_limits
        )
        self._dial_back = DialBack(swarm, dial_back_limits)
        swarm.transport_manager.add_transport(CircuitTransport(swarm))

    @property
    def reachability(self) -> Reachability:
        """How this node is reached."""
        relays = tuple(map(str, self._reservations.relays))
        forwarded = self._forwarding.forwarded
        return Reachability(
            self._reach,
            relays if self._reach is Reach.PRIVATE else (),
            insisted=self._wanted != "auto",
            forwarded_port=forwarded.port if forwarded is not None else None,
        )

    def addresses(self) -> list[Multiaddr]:
        """Where others are told to dial us."""
        if self._reach is Reach.PRIVATE:
            return self._reservations.addresses
        outside = self._outside or self._unconfirmed()
        return list(dict.fromkeys([*outside, *self._direct()]))

    def met(self) -> None:
        """A peer is connected and has said what it speaks."""
        self._met.notify()

    async def settled(self, seconds: float) -> None:
        """Return when it is known how we are reached, or after so many seconds."""
        with trio.move_on_after(seconds):
            await self._settled.wait()

    async def run(self) -> None:
        """Until cancelled."""
        self._host.set_stream_handler(AUTONAT, self._dial_back.answer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._forwarding.run)
            while True:
                if self._reach is Reach.PRIVATE:
                    await self._be_private()
                else:
                    await self._be_dialled()

    async def _be_dialled(self) -> None:
        """Serve others while they can, or may be able to, dial us."""
        self._hold_directory(True)
        self._host.set_stream_handler(HOP, self.relay.serve)
        doubted = False
        while True:
            reach = await self._find_out()
            if reach is Reach.PRIVATE and (doubted or self._reach is Reach.UNKNOWN):
                break
            doubted = reach is Reach.PRIVATE
            if reach is Reach.PUBLIC and self._reach is not reach:
                self._reach = reach
                self._changed()
            if not doubted:
                self._settled.set()
            await self._pause(doubted=doubted)
        self._reach = Reach.PRIVATE
        self._host.remove_stream_handler(HOP)

    async def _be_private(self) -> None:
        """Be reached through relays until peers can dial us after all."""
        self._hold_directory(False)
        self._host.set_stream_handler(STOP, self._reservations.accept)
        self._changed()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reservations.run)
            while True:
                await self._pause_while_known()
                if await self._find_out() is Reach.PUBLIC:
                    break
            nursery.cancel_scope.cancel()
        self._host.remove_stream_handler(STOP)
        self._reach = Reach.PUBLIC
        self._changed()

    async def _pause(self, *, doubted: bool) -> None:
        if doubted:
            await trio.sleep(_DOUBT_SECONDS)
        elif self._reach is Reach.UNKNOWN:
            with trio.move_on_after(_UNKNOWN_SECONDS):
                await self._met.wait()
        else:
            await self._pause_while_known()

    async def _pause_while_known(self) -> None:
        with trio.move_on_after(_KNOWN_SECONDS):
            await self._forwarded_otherwise.wait()
            await trio.sleep(_DOUBT_SECONDS)  # those whom we have just asked would refuse

    async def _find_out(self) -> Reach:
        if self._wanted != "auto":
            return Reach(self._wanted)
        await self._forwarding.asked()
        votes: list[Vote] = []
        ours = interface_hosts()
        outside: dict[Multiaddr, None] = {}

        async def ask(connection: SwarmConn, seen_as: Multiaddr) -> None:
            host = host_of(seen_as)
            beyond = host not in ours
            if not connection.muxed_conn.is_initiator:  # it has dialled us
                votes.append(Vote(reached=True, outside=beyond))
                if beyond:
                    outside[seen_as] = None
                return
            places = list(dict.fromkeys(self._places(str(host))))
            reached = await self._dial_back.ask(connection, places)
            if reached is not None:
                votes.append(Vote(reached=bool(reached), outside=beyond))
                if beyond:
                    outside.update(dict.fromkeys(reached))

        async with trio.open_nursery() as nursery:
            for connection, seen_as in self._voters():
                nursery.start_soon(ask, connection, seen_as)
        found = verdict(votes)
        logger.info("%d peers were asked to dial back: %s", len(votes), found)
        if found is Reach.PUBLIC and list(outside) != list(self._outside):
            self._outside = outside
            self._changed()
        return found

    def _voters(self) -> Iterator[tuple[SwarmConn, Multiaddr]]:
        """A few connected peers and where they see us; those beyond a router before neighbours."""
        ours = interface_hosts()
        seen: dict[ID, tuple[SwarmConn, Multiaddr]] = {}
        for connection in self._swarm.alive():
            below = yamux_of(connection)
            if (
                below.seen_as is not None
                and host_of(below.seen_as) is not None
                and not self._punched(below.peer_id)
            ):
                seen[below.peer_id] = connection, below.seen_as
        ranked = sorted(seen.values(), key=lambda each: host_of(each[1]) in ours)
        yield from ranked[:_VOTERS]

    def _places(self, host: str) -> Iterator[Multiaddr]:
        """Where we may be listening at an address of ours: forwarded ports first."""
        family = "ip6" if ":" in host else "ip4"
        yield from (address for address in self._direct() if host_of(address) == host)
        if (forwarded := self._forwarding.forwarded) is not None and family == "ip4":
            yield Multiaddr(f"/ip4/{host}/tcp/{forwarded.port}")
        for address in self._bound():
            yield Multiaddr(f"/{family}/{host}/tcp/{address.value_for_protocol('tcp')}")

    def _inside(self) -> list[tuple[str, int]]:
        """Where a router may forward to; nothing if none shall be asked, or none stands before us."""
        if not self._asks_routers:
            return []
        reached = {
            host: int(address.value_for_protocol("tcp") or 0)
            for address in announced_addresses(self._bound())
            if (host := host_of(address)) and ":" not in host and not is_loopback(address)
        }
        behind = not any(ip_address(host).is_global for host in reached)
        return list(reached.items()) if behind else []

    def _unconfirmed(self) -> list[Multiaddr]:
        """Where a router says that it forwards our port."""
        forwarded = self._forwarding.forwarded
        if forwarded is None or forwarded.host is None:
            return []
        return [Multiaddr(f"/ip4/{forwarded.host}/tcp/{forwarded.port}")]

    def _forwarding_changed(self) -> None:
        self._forwarded_otherwise.notify()
        self._changed()

    def _candidates(self) -> Iterator[tuple[ID, Sequence[Multiaddr]]]:
        """Peers that may relay for us, and where to dial them."""
        for peer, address in self._first_relays:
            yield peer, [address]
        store = self._swarm.peerstore
        for connection in self._swarm.alive():
            peer = connection.muxed_conn.peer_id
            if self._swarm.direct(peer) and store.supports_protocols(peer, [str(HOP)]):
                yield peer, ()

    def _changed(self) -> None:
        if self._reservations.relays:
            self._settled.set()
        self.news.notify()
