"""A session as its originator runs it: the shell around ``protocol/chain.py``.

One task per hop holds its control stream, one holds the link to the first hop, one plans routes for
missing blocks, one watches the clock. All of them are children of the session's nursery and end
with it; the chain decides, they carry out.
"""

import collections
import contextlib
import logging
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import torch
import trio

from ..inference.tensors import is_finite, to_torch
from ..protocol.chain import (
    Chain,
    ChainHop,
    ChainState,
    Closed,
    Deliver,
    DropHop,
    Event,
    HopCut,
    HopLost,
    HopReady,
    HopState,
    LinkCut,
    LinkFirst,
    OpenHop,
    ProbeHop,
    RelinkHop,
    Returned,
    Routed,
    SessionTerms,
    Ticked,
)
from ..protocol.checks import SESSION_ID_BYTES, Peer
from ..protocol.codec import max_rows
from ..protocol.errors import ConfigError, ErrorCode, NoRoute, PeerError, RemoteProtocolError
from ..protocol.frames import (
    SESSION_PROTOCOL,
    Close,
    Failed,
    Frame,
    Hello,
    Link,
    Output,
    Probe,
    Ready,
    Refused,
    Resume,
    State,
    Step,
)
from ..protocol.prefix import HashedInputs
from ..protocol.routing import RouteHop
from ..protocol.span import Span
from ..protocol.swarm import Swarm
from ..protocol.tensor import WireTensor
from .blame import Blame, LastWord
from .frame_stream import FrameStream, open_frame_stream
from .gaps import Gaps, Router
from .mending import Mending, Recovery
from .network import Network
from .outbox import Outbox
from .relay import STEP_ROWS
from .wakeup import Signal, open_flat_nursery

logger = logging.getLogger(__name__)

OPEN_TIMEOUT = 3.0
"""Seconds for a peer that we are connected to, to say ready."""
DIAL_TIMEOUT = 8.0
"""The same for one that has to be dialled first: several round trips, and keys to agree on."""
ROUND_TRIPS = 10
"""What is added to both where the way is long."""
CLOSE_TIMEOUT = 1.0
ROUTE_RETRY_DELAY = 0.5
"""Seconds before a route is looked for again when nobody serves some blocks."""
_ANOTHER_ROUTE = "the session takes another route"
"""Why a hop is dropped that has done nothing wrong."""


EmbedRows = Callable[[int, int], WireTensor | Callable[[], Awaitable[WireTensor]]]
"""From ``start, stop`` to the embeddings [batch, stop - start, hidden_size] of those positions, or to
what computes them if they are not at hand."""


class Ring:
    """One session: tokens go in at the front, hidden states of the last block come back.

    Made by ``open_ring``. One caller at a time.
    """

    def __init__(
        self,
        terms: SessionTerms,
        *,
        network: Network,
        router: Router,
        swarm: Swarm,
        hello: Hello,
        embed: EmbedRows,
        clock: Callable[[], float],
        patience: float,
        nursery: trio.Nursery,
    ) -> None:
        self._terms = terms
        self._network = network
        self._gaps = Gaps(router, terms)
        self._blame = Blame(swarm, clock)
        self._mending = Mending(clock)
        self._hello = hello
        self._embed = embed
        self._patience = patience
        self._nursery = nursery
        self._max_rows = min(STEP_ROWS, max_rows(terms.batch, terms.hidden_size, terms.wire_dtype))
        self._chain = Chain(terms, own_peer_id=network.peer_id, now=trio.current_time())
        self._inputs = HashedInputs(terms.hidden_size, terms.wire_dtype)
        self._outboxes: dict[str, collections.deque[Frame]] = {}
        self._hop_scopes: dict[str, trio.CancelScope] = {}
        self._link_scope = trio.CancelScope()
        self._delivered: list[torch.Tensor] = []
        self._looked_at: tuple[WireTensor, torch.Tensor] | None = None
        """The output that came last."""
        self._changed = Signal()
        """The chain has other hops, a hop another frame to be sent."""
        self._arrived = Signal()
        """Rows have come back, or the session cannot go on."""
        self._outbox = Outbox()
        """For the first hop."""
        self._clock_moved = Signal()
        """The chain has a deadline before the one that is watched."""
        self._watched = -math.inf
        self._error: NoRoute | None = None
        self._wanted = trio.Event()
        """Set when a step is wanted after such an error."""
        self._waiting_for: str | None = None
        self._give_up_at = trio.current_time() + patience
        """When patience ends; infinite while the ring runs."""
        self._conversing = 0
        """Hops that we still talk to."""

    @property
    def state(self) -> ChainState:
        """Whether the session is looking for a route, opening it, or running."""
        return self._chain.state

    @property
    def route(self) -> tuple[RouteHop, ...]:
        """The hops that the session runs through now."""
        return tuple(map(_route_hop, self._chain.hops))

    @property
    def recoveries(self) -> int:
        """How often the route was mended."""
        return self._chain.recoveries

    @property
    def mended(self) -> tuple[Recovery, ...]:
        """Which hops were lost, and what was done about it."""
        return self._mending.recoveries

    @property
    def reconnects(self) -> int:
        """How often a stream to a hop had to be opened again."""
        return self._chain.reconnects

    @property
    def waiting_for(self) -> str | None:
        """Why the session cannot go on at the moment, in words; None when it can."""
        return self._waiting_for

    @property
    def length(self) -> int:
        """Positions sent around so far, or about to be."""
        return self._chain.length

    @property
    def sent(self) -> int:
        """Positions of those that have left us, on the way that the session takes now."""
        return self._chain.sent

    @property
    def room(self) -> int:
        """Positions that still fit."""
        return self._terms.max_tokens - self._chain.length

    def rewind(self, position: int, order: tuple[int, ...] = ()) -> None:
        """Forget the positions from ``position`` on, here and, with the next step, at every hop.

        Before it, sequence b of the batch becomes what ``order[b]`` was.
        """
        self._chain.rewind(position, order)
        self._delivered.clear()

    async def step(self, rows: int, *, want: int) -> torch.Tensor:
        """Send the next ``rows`` positions around; returns the last ``want`` rows of the output.

        They are [batch, want, hidden_size] in ``torch_dtype`` of the wire dtype. Raises NoRoute when
        nobody serves some blocks for longer than the session's patience; the next step looks again.
        """
        chain = self._chain
        self._delivered.clear()  # of a step that was cancelled
        if self._error is not None:  # what could not be found then may be there now
            self._error = None
            self._wanted.set()
        chain.append(rows, want_from=chain.length + rows - want, now=trio.current_time())
        self._outbox.notify()
        self._look_at_clock()
        while chain.expected < chain.length:
            self._raise_error()
            await self._arrived.wait()
        self._raise_error()
        outputs, self._delivered = self._delivered, []
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # --- the chain's effects ------------------------------------------------------------------

    def _receive(self, event: Event) -> None:
        self._apply(event)
        if self._chain.state is ChainState.RUNNING:
            self._give_up_at = math.inf
        elif self._give_up_at == math.inf:
            self._give_up_at = trio.current_time() + self._patience
        if isinstance(event, Returned):
            self._mending.returned()
            self._arrived.notify()
            return  # every token: nobody else has to look
        self._changed.notify()
        self._outbox.notify()
        self._look_at_clock()

    def _apply(self, event: Event) -> None:
        hops = self._chain.hops
        for effect in self._chain.receive(event, trio.current_time()):
            if isinstance(effect, OpenHop):
                self._start_hop(effect)
            elif isinstance(effect, RelinkHop):
                self._outboxes[effect.peer_id].append(effect.frame)
            elif isinstance(effect, ProbeHop):
                self._outboxes[effect.peer_id].append(Probe(effect.nonce))
            elif isinstance(effect, DropHop):
                if isinstance(event, HopCut | LinkCut | HopState | Ticked):
                    logger.info("hop %s is lost: %s", effect.peer_id, effect.reason)
                    self._blame.failed(effect.peer_id)
                if not isinstance(event, Closed) and effect.reason != _ANOTHER_ROUTE:
                    self._mending.lost(_hop_of(effect.peer_id, hops), effect.reason)
                self._drop_hop(effect)
            elif isinstance(effect, LinkFirst):
                self._link_scope.cancel()
                self._link_scope = trio.CancelScope()
                self._nursery.start_soon(self._link_first, effect, self._link_scope)
            elif isinstance(effect, Deliver):
                self._delivered.append(self._as_tensor(effect.hidden))

    def _as_tensor(self, hidden: WireTensor) -> torch.Tensor:
        if self._looked_at is not None and self._looked_at[0] is hidden:
            return self._looked_at[1]
        return to_torch(hidden)

    def _look_at_clock(self) -> None:
        deadline = self._chain.next_deadline()
        if deadline is not None and deadline < self._watched:
            self._clock_moved.notify()

    def _start_hop(self, effect: OpenHop) -> None:
        peer_id = effect.peer.peer_id
        self._hop_scopes[peer_id] = scope = trio.CancelScope()
        outbox: collections.deque[Frame] = collections.deque([effect.frame])
        self._outboxes[peer_id] = outbox
        self._nursery.start_soon(self._run_hop, effect.peer, outbox, scope)

    def _drop_hop(self, effect: DropHop) -> None:
        """Say goodbye, for a moment; the hop frees its cache when the stream ends, too."""
        self._outboxes.pop(effect.peer_id).append(Close(effect.reason))
        self._hop_scopes.pop(effect.peer_id).deadline = trio.current_time() + CLOSE_TIMEOUT

    # --- one hop's control stream -------------------------------------------------------------

    async def _run_hop(
        self, peer: Peer, outbox: collections.deque[Frame], scope: trio.CancelScope
    ) -> None:
        def mine() -> bool:
            return self._outboxes.get(peer.peer_id) is outbox

        event: HopLost | HopCut = HopCut(peer.peer_id, "cut off")
        self._conversing += 1
        try:
            with scope:
                await self._converse(peer, outbox, mine)
        except (LastWord, RemoteProtocolError) as error:
            if mine():
                self._blame.judge(peer.peer_id, error)
            event = HopLost(peer.peer_id, str(error))
        except PeerError as error:
            event = HopCut(peer.peer_id, str(error))
        finally:
            self._conversing -= 1
            self._changed.notify()
        if mine():
            logger.info("hop %s: %s", peer.peer_id, event.reason)
            self._receive(event)

    async def _converse(
        self, peer: Peer, outbox: collections.deque[Frame], mine: Callable[[], bool]
    ) -> None:
        """Until ``close`` has been sent; every other end is a PeerError."""
        timeout = self._open_timeout(peer.peer_id)
        with trio.move_on_after(timeout) as opening:
            stream = await open_frame_stream(
                self._network, peer.peer_id, peer.multiaddrs, SESSION_PROTOCOL, self._hello
            )
            try:
                async with open_flat_nursery() as nursery:
                    nursery.start_soon(self._read_hop, peer, stream, opening, mine)
                    while True:
                        while not outbox:
                            await self._changed.wait()
                        frame = outbox.popleft()
                        await stream.send(frame)
                        if isinstance(frame, Close):
                            nursery.cancel_scope.cancel()
                            return
            finally:
                await stream.close()
        raise PeerError(
            f"did not answer within {timeout:.1f} s",
            code=ErrorCode.TIMEOUT,
            peer_id=peer.peer_id,
        )

    def _open_timeout(self, peer_id: str) -> float:
        round_trip = self._network.round_trip(peer_id)
        if round_trip is None:
            return DIAL_TIMEOUT
        return OPEN_TIMEOUT + ROUND_TRIPS * round_trip

    async def _read_hop(
        self,
        peer: Peer,
        stream: FrameStream,
        opening: trio.CancelScope,
        mine: Callable[[], bool],
    ) -> None:
        def take(frame: Frame) -> bool:
            """An output, in the turn in which it came."""
            if not isinstance(frame, Output):
                return False
            if mine():
                self._take_output(peer, frame)
            return True

        while True:
            frame = await stream.receive(take)
            if not mine():
                continue
            if isinstance(frame, Ready):
                opening.deadline = float("inf")
                self._receive(HopReady(peer.peer_id))
            elif isinstance(frame, Output):
                self._take_output(peer, frame)
            elif isinstance(frame, State):
                self._receive(HopState(peer.peer_id, frame))
            elif isinstance(frame, Failed) and frame.peer_id not in (None, peer.peer_id):
                self._replace_blamed(frame)
            elif isinstance(frame, Failed | Refused):
                raise LastWord(frame, peer.peer_id)
            else:
                said = "closed the session" if frame is None else f"sent {frame.KIND}"
                raise PeerError(said, peer_id=peer.peer_id)

    def _take_output(self, peer: Peer, output: Output) -> None:
        hidden = to_torch(output.hidden)
        if not is_finite(hidden):
            raise RemoteProtocolError("the outputs contain NaN or infinity")
        self._looked_at = output.hidden, hidden
        self._receive(Returned(peer.peer_id, output))

    def _replace_blamed(self, frame: Failed) -> None:
        """A hop says that its neighbour is at fault; if that is one of ours, replace it."""
        if frame.peer_id in self._outboxes:
            logger.info("hop %s blamed: %s", frame.peer_id, frame.reason)
            self._blame.failed(frame.peer_id)
            self._receive(HopLost(frame.peer_id, frame.reason))

    # --- our own link to the first hop --------------------------------------------------------

    async def _link_first(self, effect: LinkFirst, scope: trio.CancelScope) -> None:
        peer = effect.peer
        with scope:
            try:
                stream = await open_frame_stream(
                    self._network, peer.peer_id, peer.multiaddrs, SESSION_PROTOCOL, self._hello
                )
                try:
                    await stream.send(Link(self._terms.session, effect.epoch))
                    async with open_flat_nursery() as nursery:
                        nursery.start_soon(self._send_steps, stream, scope)
                        while True:
                            self._take_link_frame(peer, await stream.receive(), scope)
                finally:
                    await stream.close()
            except (LastWord, RemoteProtocolError) as error:
                self._blame.judge(peer.peer_id, error)
                event: HopLost | LinkCut = HopLost(peer.peer_id, f"link: {error}")
            except PeerError as error:
                event = LinkCut(f"link: {error}")
            if scope is self._link_scope:
                logger.info("first hop %s: %s", peer.peer_id, event.reason)
                self._receive(event)

    def _take_link_frame(self, peer: Peer, frame: Frame | None, scope: trio.CancelScope) -> None:
        if isinstance(frame, Resume):
            if scope is self._link_scope:  # else it speaks of a link that has been replaced
                self._receive(frame)
        elif isinstance(frame, Refused | Failed):
            raise LastWord(frame, peer.peer_id)
        else:
            said = "closed the link" if frame is None else f"sent {frame.KIND} on the link"
            raise PeerError(said, peer_id=peer.peer_id)

    async def _send_steps(self, stream: FrameStream, scope: trio.CancelScope) -> None:
        def next_frame() -> Frame | Callable[[], Awaitable[Frame]] | None:
            # What is due is due on the newest link: one that is being given up must not take it along.
            due = self._chain.next_due(self._max_rows) if scope is self._link_scope else None
            if due is None:
                return None
            want_from = self._chain.expected

            def step(hidden: WireTensor) -> Step:
                return Step(
                    due.link, due.sequence, due.rewind, due.start, want_from, hidden, past=due.past
                )

            hidden = self._embed(due.start, due.stop)
            if isinstance(hidden, WireTensor):
                return step(hidden)

            async def later() -> Step:
                return step(await hidden())

            return later

        await self._outbox.run(stream, next_frame)

    # --- the route ----------------------------------------------------------------------------

    async def plan_routes(self) -> None:
        """Find hops for missing blocks, whenever there are some; a task of the session."""
        while True:
            while not self._chain.missing:
                await self._changed.wait()
            await self._mend()

    async def _mend(self) -> None:
        entries = await self._hash_inputs()
        fresh = False
        while missing := self._chain.missing:
            try:
                hops = await self._plan(missing, fresh=fresh)
            except NoRoute as error:
                self._waiting_for = str(error)
                if fresh and trio.current_time() >= self._give_up_at:
                    await self._give_up(error)
                elif fresh:
                    await trio.sleep(ROUTE_RETRY_DELAY)
                fresh = True
                continue
            planned = [block for hop in hops for block in range(hop.span.start, hop.span.end)]
            needed = [block for gap in self._chain.missing for block in range(gap.start, gap.end)]
            if planned == needed:  # else something was lost while we planned
                self._waiting_for = None
                self._mending.routed(map(_route_hop, hops))
                self._receive(Routed(hops, entries))
            await trio.lowlevel.checkpoint()

    async def _give_up(self, error: NoRoute) -> None:
        """Let ``step`` raise ``error``; return when another step is wanted."""
        self._error, self._wanted = error, trio.Event()
        self._arrived.notify()
        await self._wanted.wait()
        self._give_up_at = trio.current_time() + self._patience

    async def _hash_inputs(self) -> Sequence[bytes]:
        """The entry digests of what goes into the chain, for new hops that may know it already."""
        while (start := self._inputs.rows) < (end := self._chain.offerable):
            stop = min(end, start + self._max_rows)
            embedded = self._embed(start, stop)
            hidden = embedded if isinstance(embedded, WireTensor) else await embedded()
            if stop > self._chain.offerable:
                break  # rewound meanwhile: these rows may be of the time before or after
            self._inputs.take(start, stop - start, hidden.data)
        return self._inputs.digests

    async def _plan(self, missing: Sequence[Span], *, fresh: bool) -> list[ChainHop]:
        """Hops for the gaps; or, when only peers of the chain could fill them, a whole new chain."""
        kept = self._chain.hops
        try:
            return await self._gaps.fill(missing, kept, fresh=fresh)
        except NoRoute:
            if not kept or not fresh:
                raise
        hops = await self._gaps.fill([self._terms.span], (), fresh=False)
        for hop in kept:
            self._receive(HopLost(hop.peer.peer_id, _ANOTHER_ROUTE))
        return hops

    async def watch_clock(self) -> None:
        """Tell the chain when its deadline has passed; a task of the session.

        A deadline that is put off, as every token does, is noticed when the old one passes.
        """
        while True:
            deadline = self._chain.next_deadline()
            self._watched = math.inf if deadline is None else deadline
            with trio.move_on_at(self._watched) as waiting:
                await self._clock_moved.wait()
            if waiting.cancelled_caught:
                self._receive(Ticked())

    async def close(self) -> None:
        """Tell every hop that the session is over; bounded in time, also while being cancelled."""
        for hop in self._chain.hops:
            if hop.ready:
                self._blame.served(hop.peer.peer_id)
        self._receive(Closed("the session is over"))
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            while self._conversing:
                await self._changed.wait()


def _route_hop(hop: ChainHop) -> RouteHop:
    return RouteHop(hop.peer.peer_id, hop.peer.multiaddrs, hop.span)


def _hop_of(peer_id: str, hops: Sequence[ChainHop]) -> RouteHop:
    return next(_route_hop(hop) for hop in hops if hop.peer.peer_id == peer_id)


@contextlib.asynccontextmanager
async def open_ring(
    terms: SessionTerms,
    *,
    network: Network,
    router: Router,
    swarm: Swarm,
    hello: Hello,
    embed: EmbedRows,
    clock: Callable[[], float],
    patience: float,
) -> AsyncIterator[Ring]:
    """Run a session: a context in which its tasks live. Leaving it closes the session everywhere.

    Raises ConfigError when one row of the batch does not fit a frame.
    """
    if max_rows(terms.batch, terms.hidden_size, terms.wire_dtype) < 1:
        raise ConfigError(
            f"batch: {terms.batch} rows of {terms.hidden_size} {terms.wire_dtype} do not fit a "
            "frame; use a smaller batch"
        )
    async with open_flat_nursery() as nursery:
        ring = Ring(
            terms,
            network=network,
            router=router,
            swarm=swarm,
            hello=hello,
            embed=embed,
            clock=clock,
            patience=patience,
            nursery=nursery,
        )
        nursery.start_soon(ring.plan_routes)
        nursery.start_soon(ring.watch_clock)
        try:
            yield ring
        finally:
            await ring.close()
            nursery.cancel_scope.cancel()


def new_session_id() -> bytes:
    """128 random bits: nobody can guess another's session."""
    return secrets.token_bytes(SESSION_ID_BYTES)
