"""A node: everything wired together in one nursery.

``async with Node(config) as node:`` joins the swarm, serves what the config says, and is ready to
originate; leaving the block announces the departure, lets running steps end, and frees everything.
A block that is cancelled from outside frees everything, too, but cannot say goodbye: the network's
tasks are cancelled with it. To leave in good order, let the block come to its end.
"""

import contextlib
import logging
import math
import random  # noqa: TID251 - this is the wiring
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from secrets import token_bytes
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import trio

from .. import __version__
from ..inference.sampling_params import SamplingParams
from ..inference.torch_thread import TorchThread
from ..protocol.announcement import Announcement, PeerState, as_multiaddrs, merge_entries
from ..protocol.coordinates import Coordinate
from ..protocol.errors import ConfigError, PeerError, PetalsError
from ..protocol.expected import Expected
from ..protocol.frames import (
    DESCRIBE_PROTOCOL,
    PROTOCOL_VERSION,
    SESSION_PROTOCOL,
    SHARD_PROTOCOL,
    Hello,
)
from ..protocol.manifest import ENDS, FILES, shards_of
from ..protocol.round_trips import ends, successors
from ..protocol.span import Span
from ..protocol.swarm import Swarm
from ..protocol.tally import Tallies
from ..protocol.tensor import DType
from . import describe, saved_session
from .config import NodeConfig
from .identity import load_identity, new_identity
from .latency import LatencyWatch
from .libp2p_network import Libp2pNetwork, NetworkLimits, open_network
from .libp2p_swarm import HostLimits
from .loopback import LoopbackNetwork
from .membership import Membership
from .mending import Recovery
from .network import Stream
from .opening import Opener
from .placing import Placing
from .private import Privacy
from .reachability import Reachability
from .rebalance import Rebalance
from .router import SwarmRouter
from .shard_fetch import Fetching
from .shard_server import ShardServer
from .uploads import Uploads
from .wakeup import open_flat_nursery, wait_future
from .weights import FetchedWeights, Weights, runs_to_give

if TYPE_CHECKING:
    from ..inference.checkpoint import Checkpoint
    from ..inference.histogram import HistogramFigures
    from ..inference.progress import Progress
    from .generation import Generation, GenerationHandle
    from .hidden_session import HiddenSession
    from .originate import Originator, Prompt, Session
    from .server import BlockServer

logger = logging.getLogger(__name__)

REJOIN_INTERVAL = 20.0
"""Seconds between two looks at whether anybody is connected, and every bootstrap peer."""
LEAVE_TIMEOUT = 3.5
"""Seconds for leaving in good order, of the five that a user waits at most."""
RUNNING_STEPS_PATIENCE = 1.0
DESCRIBED_PEERS = 64
"""How many peers ``survey`` asks for their present load; the others are as they announced."""
REMEMBERED_RECOVERIES = 64
"""Of texts that have ended."""

Survey = list[tuple[Announcement, Mapping[str, float] | None]]
"""Peers and their figures; None: they were not asked, or have not answered."""

MIB = 1 << 20

T = TypeVar("T")


def wall_clock() -> float:
    """Unix seconds: what announcements are dated with."""
    return time.time()  # noqa: TID251 - this is the wiring


class Node:
    """One symmetric node of the swarm. Use it as an async context manager, in trio."""

    def __init__(
        self,
        config: NodeConfig,
        progress: "Progress | None" = None,
        *,
        torch_thread: TorchThread | None = None,
    ) -> None:
        """``progress`` is told what takes a while: downloads, and loading blocks.

        ``torch_thread``: of a program that computes on it, too, or has several nodes; it outlives the
        node.
        """
        self.config = config
        self._progress = progress
        self.model_name: str | None = None
        """What the swarm is told that the model is called, once it was opened."""
        self._context = self._running()
        self._dice = random.Random()  # noqa: S311 - spreads load; nothing secret
        self._hello = Hello(PROTOCOL_VERSION, __version__[:64])
        self._torch = torch_thread or TorchThread()
        self._owns_torch = torch_thread is None
        self._outside: Libp2pNetwork | None = None
        self._network: LoopbackNetwork | None = None
        self._membership: Membership | None = None
        self._latency: LatencyWatch | None = None
        self._nursery: trio.Nursery | None = None
        self._checkpoint: Checkpoint | None = None
        self._weights: Weights | None = None
        self._server: BlockServer | None = None
        self._expected = Expected()
        self._originator: Originator | None = None
        self._seeding = False
        self._originator_lock = trio.Lock()
        self._generations: dict[GenerationHandle, None] = {}
        """Those that run, the oldest first."""
        self._recoveries: deque[Recovery] = deque(maxlen=REMEMBERED_RECOVERIES)
        self._span: Span | None = None
        self._dtype = ""

    async def __aenter__(self) -> "Node":
        """Join, and serve what is to be served. Raises ConfigError, ModelError, PeerError."""
        await self._context.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        """Leave the swarm and free everything, within a few seconds."""
        return await self._context.__aexit__(kind, error, trace)

    # --- who and where ------------------------------------------------------------------------

    @property
    def peer_id(self) -> str:
        """Our own peer id."""
        return self._running_network().peer_id

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """Where others can dial us; empty for a node that does not serve."""
        return self._running_network().multiaddrs

    @property
    def span(self) -> Span | None:
        """The blocks that this node serves, or will when it is online."""
        return self._span if self._server is None else self._server.span

    @property
    def reachability(self) -> Reachability:
        """Whether others can dial us, or through whom else they reach us."""
        return self._running_outside().reachability

    async def reachability_changed(self) -> None:
        """Return when ``reachability`` or ``multiaddrs`` become others."""
        await self._running_outside().reachability_changed()

    @property
    def fingerprint(self) -> str | None:
        """The model's identity, once it was opened: others can join with ``petals:`` and this."""
        return None if self._checkpoint is None else self._checkpoint.fingerprint

    @property
    def model_bytes(self) -> int | None:
        """The size of the whole model, once it was opened."""
        return None if self._checkpoint is None else self._checkpoint.manifest.size

    @property
    def fetched(self) -> Sequence[Fetching]:
        """The weights that have come from peers, or were on the disk from before."""
        return self._weights.fetched if isinstance(self._weights, FetchedWeights) else ()

    @property
    def num_blocks(self) -> int | None:
        """How many blocks the model has, once it was opened."""
        return None if self._checkpoint is None else self._checkpoint.num_blocks

    def statistics(self) -> dict[str, float]:
        """Figures about this node, by name; what ``/petals/describe/1`` tells others, too."""
        network = self._running_network().statistics()
        figures: dict[str, float] = {
            "connections": network.connections,
            "streams": network.streams,
            "generations": len(self._generations),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
        }
        for direction, by_protocol in (
            ("sent", network.bytes_sent),
            ("received", network.bytes_received),
        ):
            for protocol, count in by_protocol.items():
                figures[f"bytes_{direction} {protocol}"[:64]] = count
        server = self._server
        if server is not None and server.served is not None and server.relay is not None:
            engine, throughput = server.served.engine.statistics(), server.served.throughput
            figures |= {
                "sessions": server.sessions,
                "engine_sessions": engine.sessions,
                "cache_tokens_total": engine.cache_tokens_total,
                "cache_tokens_used": engine.cache_tokens_used,
                "steps": engine.steps,
                "rounds": engine.rounds,
                "rows": engine.rows,
                "steps_queued": engine.queued,
                "busy_seconds": engine.busy_seconds,
                "queued_seconds": engine.queued_seconds,
                "block_tokens_per_second decode": throughput.decode,
                "block_tokens_per_second decode_8": throughput.decode_8,
                "block_tokens_per_second decode_32": throughput.decode_32,
                "block_tokens_per_second prefill": throughput.prefill,
                "prefix_tokens": engine.prefix_tokens,
                "prefix_hits": engine.prefix_hits,
                "prefix_tokens_reused": engine.prefix_tokens_reused,
            }
            figures |= {f"refused {code}": count for code, count in server.relay.refusals.items()}
        return figures

    def histograms(self) -> "dict[str, HistogramFigures]":
        """What this node's blocks have had to do, by name; empty while it serves none."""
        served = None if self._server is None else self._server.served
        return {} if served is None else served.engine.histograms()

    # --- originating --------------------------------------------------------------------------

    async def submit(
        self,
        prompt: "str | Sequence[Prompt]",
        params: SamplingParams | None = None,
        *,
        max_length: int | None = None,
        save_to: Path | str | None = None,
    ) -> "GenerationHandle":
        """Start generating from one prompt, or from several together in one session.

        Of several, each is a text or a sequence of token ids.
        Iterate over the handle for the text as it comes. ``save_to`` is a file for ``resume``: it is
        made or replaced now, and kept up to date until the end. Raises ConfigError for arguments
        that cannot be, ModelError if the model's ends cannot be loaded.
        """
        originator = await self.originator()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        file = None if save_to is None else Path(save_to)
        handle = originator.submit(
            prompts, params or SamplingParams(), max_length=max_length, save_to=file
        )
        return await self._start(handle, file)

    async def resume(
        self, path: Path | str, *, prompt: str | None = None, save_to: Path | str | None = None
    ) -> "GenerationHandle":
        """Start generating the rest of a text that was saved; its first part is there at once.

        The text is the one that it would have become had nothing broken off. ``prompt``: what it
        must have begun with. ``save_to``: as in ``submit``; it may be ``path``. Raises ConfigError
        when the file cannot be read, or is of another model or prompt.
        """
        originator = await self.originator()
        saved = await trio.to_thread.run_sync(saved_session.load, Path(path))
        file = None if save_to is None else Path(save_to)
        handle = originator.resume(saved, prompt=prompt, save_to=file)
        return await self._start(handle, file)

    async def generate(
        self, prompt: str, params: SamplingParams | None = None, *, max_length: int | None = None
    ) -> "Generation":
        """Generate from a prompt. Raises as ``submit``, and NoRoute, ModelMismatch, PeerError."""
        handle = await self.submit(prompt, params, max_length=max_length)
        try:
            return await handle.result()
        finally:
            handle.cancel()

    async def stream(self, prompt: str, params: SamplingParams | None = None) -> AsyncIterator[str]:
        """The text of ``generate`` as it comes."""
        handle = await self.submit(prompt, params)
        try:
            async for piece in handle:
                yield piece
        finally:
            handle.cancel()

    @contextlib.asynccontextmanager
    async def open_session(
        self, max_tokens: int | None = None, *, batch: int = 1, padding: Sequence[int] = ()
    ) -> AsyncIterator["Session"]:
        """A session that keeps its KV cache on every hop from one call to the next.

        ``max_tokens`` positions are reserved; None: what the model was made for.
        """
        originator = await self.originator()
        room = max_tokens or originator.checkpoint.max_length
        async with originator.open_session(room, batch=batch, padding=padding) as session:
            yield session

    @contextlib.asynccontextmanager
    async def reopen_session(self, saved: saved_session.SavedSession) -> AsyncIterator["Session"]:
        """A session that goes on behind the tokens of a saved one. Raises ConfigError."""
        originator = await self.originator()
        async with originator.reopen_session(saved) as session:
            yield session

    @contextlib.asynccontextmanager
    async def open_hidden_session(
        self,
        max_tokens: int,
        *,
        span: Span | None = None,
        batch: int = 1,
        padding: Sequence[int] = (),
    ) -> AsyncIterator["HiddenSession"]:
        """A session of hidden states, through the blocks of ``span`` (None: all of them).

        Raises ConfigError.
        """
        originator = await self.originator()
        async with originator.open_hidden_session(
            max_tokens, span=span, batch=batch, padding=padding
        ) as session:
            yield session

    async def _start(self, handle: "GenerationHandle", file: Path | None) -> "GenerationHandle":
        if file is not None:
            await handle.save(file)  # where it cannot be written, that is told now
        self._running_nursery().start_soon(self._generate, handle)
        return handle

    async def _generate(self, handle: "GenerationHandle") -> None:
        self._generations[handle] = None
        try:
            await handle.run()
        finally:
            del self._generations[handle]
            self._recoveries.extend(handle.status().mended)

    @property
    def generations(self) -> "tuple[GenerationHandle, ...]":
        """The texts that are being generated, the oldest first."""
        return tuple(self._generations)

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """Which hops this node's texts have lost lately, and what was done about it."""
        running = (recovery for handle in self._generations for recovery in handle.status().mended)
        return (*self._recoveries, *running)

    async def originator(self) -> "Originator":
        """What all sessions of this node have in common: the model's ends, loaded when first asked for.

        Raises ConfigError if the node has no model, ModelError if they cannot be loaded.
        """
        async with self._originator_lock:
            if self._originator is None:
                self._originator = await self._make_originator()
            return self._originator

    async def _make_originator(self) -> "Originator":
        if self.config.model is None:
            raise ConfigError("model: this node has none to generate with; name it (--model)")
        checkpoint = await self._open_checkpoint()
        membership, network = self._running_membership(), self._running_network()
        await self._ensure("ends", [FILES, ENDS], self.config.patience)
        if not self.config.serve:  # a node that serves keeps its view fresh already
            membership.watch(checkpoint.fingerprint, checkpoint.num_blocks)
            self._running_nursery().start_soon(membership.run)
        swarm = self._swarm

        def load() -> "Originator":
            from ..inference.tensors import wire_dtype
            from .originate import Originator

            dtype, device = self.config.dtype, self.config.device
            ends = checkpoint.load_ends(dtype, device)
            chosen = self.config.wire_dtype
            narrow = wire_dtype(checkpoint.precision(dtype, device).cache)
            return Originator(
                checkpoint,
                ends,
                checkpoint.load_tokenizer(),
                wire_dtype=narrow if chosen == "auto" else DType(chosen),
                compute=self._in_turn if ends.device.type == "cpu" else self._in_torch_thread,
                network=network,
                router=SwarmRouter(
                    membership,
                    swarm,
                    model_name=self.model_name or "the model",
                    fingerprint=checkpoint.fingerprint,
                    num_blocks=checkpoint.num_blocks,
                    round_trips=self._round_trips,
                    coordinate=self._coordinate,
                    ask=self.describe,
                    ourselves=self._ourselves,
                    clock=wall_clock,
                    dice=self._dice,
                ),
                swarm=swarm,
                hello=self._hello,
                clock=wall_clock,
                patience=self.config.patience,
            )

        return await self._in_torch_thread(load)

    def _ourselves(self) -> Announcement | None:
        """This node as a candidate for its own sessions."""
        if self._server is None or self._server.state is not PeerState.ONLINE:
            return None
        return self._describe_self(0, wall_clock() + 1)

    def _round_trips(self) -> dict[str, float]:
        """Seconds to the peers that were measured, and to ourselves."""
        assert self._latency is not None, "made as soon as there is a network"
        return {**self._latency.known(), self.peer_id: 0.0}

    def _useful_peers(self) -> list[Announcement]:
        """Whom this node would use: behind its own blocks, and at the ends of its sessions."""
        checkpoint = self._checkpoint
        if checkpoint is None:
            return []
        peers = self._swarm.candidates(wall_clock(), checkpoint.fingerprint)
        useful = set() if self.span is None else successors(self.span, peers)
        if self._originator is not None:
            useful |= ends(checkpoint.num_blocks, peers)
        return [peer for peer in peers if peer.peer_id in useful]

    def _coordinate(self) -> Coordinate:
        assert self._latency is not None, "made as soon as there is a network"
        return self._latency.coordinate

    def _successor_round_trips(self, span: Span) -> dict[str, float]:
        if self._latency is None:
            return {}
        now = wall_clock()
        measured = (self._swarm.get(peer_id, now) for peer_id in self._latency.measured())
        count = self._running_membership().upkeep.round_trips
        return self._latency.nearest(successors(span, filter(None, measured)), count)

    # --- looking at the swarm -----------------------------------------------------------------

    async def swarm_view(self, model_name: str | None = None) -> list[Announcement]:
        """Who serves what, as of now: of the models called ``model_name``, or of every model.

        Raises PeerError when the swarm cannot be asked.
        """
        return [peer for peer, _ in await self.survey(model_name)]

    async def survey(self, model_name: str | None = None) -> Survey:
        """``swarm_view``, with the figures that each peer has of itself."""
        listed = await self._running_membership().find(model_name)
        found: Survey = [(peer, None) for peer in listed]

        async def ask(index: int, peer: Announcement) -> None:
            with contextlib.suppress(PeerError):
                fresh, figures = await self.describe(peer.peer_id, peer.multiaddrs)
                found[index] = (peer if fresh is None else fresh, figures)

        async with trio.open_nursery() as nursery:
            for index, peer in enumerate(listed[:DESCRIBED_PEERS]):
                nursery.start_soon(ask, index, peer)
        return found

    def round_trip(self, peer_id: str) -> float | None:
        """Seconds to a peer and back, where that was measured."""
        return self._round_trips().get(peer_id)

    async def describe(
        self, peer_id: str, multiaddrs: Sequence[str] = (), *, blocks: int | None = None
    ) -> tuple[Announcement | None, Mapping[str, float]]:
        """Ask a peer for its announcement and its figures. Raises PeerError.

        ``blocks``: how many of them a session would run that is about to be opened there.
        """
        network = self._running_network()
        return await describe.ask(
            network, peer_id, multiaddrs, self._hello, blocks=blocks, now=wall_clock()
        )

    # --- the life of a node -------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        config = self.config
        file = config.identity_file
        identity = new_identity() if file is None else load_identity(file)
        self._swarm = Swarm(identity.peer_id)
        async with open_network(
            identity,
            merge=partial(merge_entries, salt=token_bytes(16)),
            counting=Tallies(),
            clock=wall_clock,
            listen=config.listen if config.serve else (),
            announce=config.announce,
            bootstrap=config.bootstrap,
            reachability=config.reachability,
            upnp=config.upnp,
            mdns=config.looks_around,
            privacy=Privacy.of_files(config.swarm_key, config.allow_peers),
            limits=NetworkLimits(host=HostLimits.admitting(config.limits)),
        ) as outside:
            self._outside = outside
            self._membership = Membership(
                outside,
                self._swarm,
                sign=identity.sign,
                describe=self._describe_self,
                clock=wall_clock,
                dice=self._dice,
            )
            async with open_flat_nursery() as self._nursery:
                self._network = LoopbackNetwork(outside, self._nursery)
                self._latency = LatencyWatch(
                    self._network,
                    candidates=self._useful_peers,
                    ask=self.describe,
                    heard=lambda peer: self._swarm.update(peer, wall_clock()),
                    dice=self._dice,
                )
                try:
                    self._network.handle(DESCRIBE_PROTOCOL, self._answer_describe)
                    self._nursery.start_soon(self._stay_joined)
                    self._nursery.start_soon(self._tell_how_we_are_reached)
                    self._nursery.start_soon(self._latency.run)
                    if config.seed:
                        await self._start_seeding()
                    elif config.serve and config.model is not None:
                        await self._start_serving()
                    yield
                finally:
                    with trio.move_on_after(LEAVE_TIMEOUT, shield=True):
                        await self._leave()
                    self._nursery.cancel_scope.cancel()
                    if isinstance(self._weights, FetchedWeights):
                        self._weights.close()
                    if self._owns_torch:
                        self._torch.shutdown(timeout=0)

    async def _start_seeding(self) -> None:
        checkpoint, membership = await self._open_checkpoint(), self._running_membership()
        await self._running_nursery().start(membership.run)
        await self._ensure("shards", range(len(checkpoint.manifest.shards)), math.inf)
        self._seeding = True
        await membership.announce()

    async def _start_serving(self) -> None:
        network, membership = self._running_network(), self._running_membership()
        checkpoint = await self._open_checkpoint()

        from . import serving
        from .server import BlockServer

        membership.watch(checkpoint.fingerprint, checkpoint.num_blocks)
        capacity = await self._in_torch_thread(partial(serving.capacity, checkpoint, self.config))
        self._dtype = capacity.dtype
        placing = Placing(
            membership,
            self._swarm,
            fingerprint=checkpoint.fingerprint,
            num_blocks=checkpoint.num_blocks,
            capacity_blocks=capacity.num_blocks,
            ourselves=self._ourselves,
            clock=wall_clock,
            dice=self._dice,
        )
        self._span = capacity.span or await placing.choose()
        nursery = self._running_nursery()
        await nursery.start(membership.run)
        server = BlockServer(
            network,
            checkpoint,
            self.config,
            hello=self._hello,
            thread=self._torch,
            fetch=self._fetch_span,
            on_change=membership.changed,
            progress=self._progress,
        )
        await server.start(self._span)
        self._server = server
        network.handle(SESSION_PROTOCOL, partial(self._serve_session, server))
        if isinstance(self._weights, FetchedWeights):
            nursery.start_soon(self._weights.check_rest)
        await membership.announce()
        if capacity.span is None and capacity.num_blocks < checkpoint.num_blocks:
            rebalance = Rebalance(
                interval=placing.interval,
                look=placing.look,
                refresh=placing.know_anew,
                move=server.move,
                dice=self._dice,
            )
            nursery.start_soon(rebalance.run)

    async def _open_checkpoint(self) -> "Checkpoint":
        if self._checkpoint is not None:
            return self._checkpoint

        opener = Opener(
            self.config,
            network=self._running_network(),
            membership=self._running_membership(),
            swarm=self._swarm,
            hello=self._hello,
            clock=wall_clock,
            dice=self._dice,
            compute=self._in_torch_thread,
            progress=self._progress,
        )
        opened = await opener.open()
        checkpoint, self.model_name, self._weights = opened.checkpoint, opened.name, opened.weights
        self._checkpoint = checkpoint
        if self.config.serve:
            limit = self.config.upload_limit
            uploads = Uploads(None if limit is None else limit * MIB, self._busy_seconds)
            server = ShardServer(self._weights, uploads, self._hello)
            self._running_network().handle(SHARD_PROTOCOL, server.handle)
        return checkpoint

    async def _ensure(self, what: str, shards: Sequence[int], patience: float) -> None:
        assert self._weights is not None, "made when the model is opened"
        await self._weights.ensure(what, shards, patience=patience)

    async def _fetch_span(self, span: Span, patience: float) -> None:
        await self._ensure("blocks", shards_of(span), patience)

    def _busy_seconds(self) -> float:
        served = None if self._server is None else self._server.served
        return 0.0 if served is None else served.engine.statistics().busy_seconds

    async def _in_torch_thread(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the thread that runs torch in this process, the engine's, too."""
        return await wait_future(self._torch.run(function))

    async def _in_turn(self, function: Callable[[], T]) -> T:
        """The same for what takes no longer than a round: alone among the nodes of this machine."""
        return await self._in_torch_thread(partial(self._torch.cores.run, function))

    async def _stay_joined(self) -> None:
        """Bootstrap again: soon when nobody is connected any more, else now and then, for peers we miss.

        One that has been restarted knows nobody, and whoever joins through it would be alone with it.
        """
        network, bootstrap = self._running_network(), self.config.bootstrap
        tried = trio.current_time()
        while bootstrap or self.config.looks_around:
            await trio.sleep(REJOIN_INTERVAL)
            connected = network.connected_peers()
            missed = [peer for peer in bootstrap if peer.rpartition("/p2p/")[2] not in connected]
            rests = tried + self._running_membership().upkeep.refresh_interval
            if not connected or (missed and trio.current_time() >= rests):
                tried = trio.current_time()
                reached = await network.join(missed)
                logger.info("missed %d bootstrap peers, reached %d", len(missed), reached)

    async def _tell_how_we_are_reached(self) -> None:
        while True:
            await self.reachability_changed()
            self._running_membership().changed()

    async def _leave(self) -> None:
        if self._server is None:
            if self.config.seed:
                await self._running_membership().leave()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._server.leave, RUNNING_STEPS_PATIENCE)
            nursery.start_soon(self._running_membership().leave)
        self._server.shutdown()

    # --- what we say of ourselves -------------------------------------------------------------

    def _describe_self(self, sequence: int, expires_at: float) -> Announcement | None:
        checkpoint, server = self._checkpoint, self._server
        if checkpoint is None or self._weights is None or self.model_name is None:
            return None
        if self.span is None and not self.config.seed:
            return None
        served = None if server is None else server.served
        used = None if served is None else served.engine.statistics()
        return Announcement(
            peer_id=self.peer_id,
            multiaddrs=as_multiaddrs(self.multiaddrs),
            model=checkpoint.fingerprint,
            model_name=self.model_name,
            num_blocks=checkpoint.num_blocks,
            span=self.span,
            moving_to=None if server is None else server.moving_to,
            state=self._state(),
            dtype=self._dtype or "none",
            decode_speed=0.0 if served is None else served.throughput.decode,
            prefill_speed=0.0 if served is None else served.throughput.prefill,
            cache_tokens_left=(
                0 if used is None else used.cache_tokens_total - used.cache_tokens_used
            ),
            sessions=0 if server is None else server.sessions,
            session_blocks=0 if server is None else server.session_blocks,
            version=__version__[:24],
            sequence=sequence,
            expires_at=expires_at,
            public_name=self.config.public_name,
            round_trips={} if self.span is None else self._successor_round_trips(self.span),
            coordinate=self._coordinate(),
            shards=runs_to_give(self._weights),
        )

    def _state(self) -> PeerState:
        if self._server is not None:
            return self._server.state
        return PeerState.ONLINE if self._seeding else PeerState.JOINING

    async def _answer_describe(self, stream: Stream) -> None:
        await describe.answer(
            stream,
            self._hello,
            announcement=self._running_membership().describe,
            figures=self.statistics,
            expected=self._expected,
        )

    async def _serve_session(self, server: "BlockServer", stream: Stream) -> None:
        self._expected.came(stream.peer_id)
        await server.handle(stream)

    def _running_network(self) -> LoopbackNetwork:
        if self._network is None:
            raise PetalsError("the node is not running: use it inside `async with Node(config)`")
        return self._network

    def _running_outside(self) -> Libp2pNetwork:
        self._running_network()
        assert self._outside is not None
        return self._outside

    def _running_membership(self) -> Membership:
        self._running_network()
        assert self._membership is not None
        return self._membership

    def _running_nursery(self) -> trio.Nursery:
        self._running_network()
        assert self._nursery is not None
        return self._nursery
