"""The blocks that this node serves, and how they become others.

A node that moves loads its new blocks beside the old ones where the memory allows, and serves the old
ones meanwhile; what both spans have in common is not loaded again. Then new sessions go to the new
blocks, and those of the old ones are handed over to other nodes, as when a node leaves. Where the
memory does not allow that, the old blocks go first.

Rules of this file: nothing here decides where to move. At any time at most one move is under way.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

import trio

from ..inference.checkpoint import Checkpoint
from ..inference.progress import Progress
from ..inference.progress import log as log_progress
from ..inference.torch_thread import TorchThread
from ..protocol.announcement import PeerState
from ..protocol.errors import PetalsError
from ..protocol.frames import Hello
from ..protocol.span import Span
from . import serving
from .config import NodeConfig
from .network import Network, Stream
from .relay import Relay
from .serving import Served
from .wakeup import wait_future

logger = logging.getLogger(__name__)

FETCH_PATIENCE = 60.0
"""Seconds that a move waits for somebody who has its blocks' weights; the old ones are served meanwhile."""
HAND_OVER_PATIENCE = 5.0
"""Seconds for the running steps of sessions that are handed over before a move drops their blocks."""


class BlockServer:
    """Serves a span of ``checkpoint`` to others, and moves to another one when told."""

    def __init__(
        self,
        network: Network,
        checkpoint: Checkpoint,
        config: NodeConfig,
        *,
        hello: Hello,
        thread: TorchThread,
        fetch: Callable[[Span, float], Awaitable[None]],
        on_change: Callable[[], None],
        progress: Progress | None,
    ) -> None:
        """``fetch`` returns when the checkpoint has the weights of a span.

        It gives up when nothing of them has come for so many seconds. ``on_change`` is called when
        there is something new to announce. ``progress`` is told how far loading is; None: the log is.
        """
        self._network = network
        self._checkpoint = checkpoint
        self._config = config
        self._hello = hello
        self._thread = thread
        self._fetch = fetch
        self._on_change = on_change
        self._progress = progress
        self.span: Span | None = None
        """What is served, or will be when the state is online."""
        self.moving_to: Span | None = None
        """What is being loaded while ``span`` is still served."""
        self.state = PeerState.JOINING
        self.served: Served | None = None
        self.relay: Relay | None = None
        self._retiring: list[Relay] = []

    @property
    def sessions(self) -> int:
        """Sessions open now, those that are being handed over included."""
        return sum(relay.sessions for relay in self._relays())

    @property
    def session_blocks(self) -> int:
        """Over all open sessions, the blocks that they run here."""
        return sum(relay.session_blocks for relay in self._relays())

    async def start(self, span: Span) -> None:
        """Load ``span`` and serve it. Raises ModelError or ConfigError."""
        self.span = span
        await self._fetch(span, math.inf)
        await self._serve(span, None)

    async def move(self, span: Span) -> None:
        """Serve ``span`` and nothing else. Raises ModelError when that cannot be loaded.

        The node serves then what it did before.
        """
        before, old = self.span, self.served
        assert before is not None
        assert old is not None
        logger.info("moving from blocks %s to %s", before, span)
        beside = await wait_future(
            self._thread.run(
                partial(serving.fits_beside, self._checkpoint, span, old, self._config)
            )
        )
        self.moving_to = span
        self._on_change()
        try:
            await self._fetch(span, FETCH_PATIENCE)
            if beside:
                await self._serve(span, old)
                return
        finally:
            self.moving_to = None
            self._on_change()
        logger.info("the memory does not hold both spans: giving up blocks %s first", before)
        self.state, self.span = PeerState.JOINING, span
        self._on_change()
        relay, self.relay, self.served = self.relay, None, None
        assert relay is not None
        await self._retire(relay, old)
        try:
            await self._serve(span, None)
        except PetalsError:
            self.span = before
            await self._fetch(before, math.inf)
            await self._serve(before, None)
            raise

    async def handle(self, stream: Stream) -> None:
        """Serve one inbound stream of the session protocol."""
        if self.relay is not None:
            await self.relay.handle(stream)
        else:
            await stream.close()  # between two spans: as if the node were not there yet

    async def leave(self, patience: float) -> None:
        """Hand over all sessions; running steps have ``patience`` seconds to end."""
        self.state = PeerState.DRAINING
        async with trio.open_nursery() as nursery:
            for relay in self._relays():
                nursery.start_soon(relay.leave, patience, "this node is leaving the swarm")

    def shutdown(self) -> None:
        """Compute nothing more."""
        if self.served is not None:
            self.served.engine.shutdown()

    async def _serve(self, span: Span, old: Served | None) -> None:
        """Load ``span``, beside what is served, and put it in its place."""
        served = await wait_future(
            self._thread.run(
                partial(
                    serving.load,
                    self._checkpoint,
                    span,
                    self._config,
                    self._progress or log_progress,
                    thread=self._thread,
                    loaded=None if old is None else old.engine.blocks,
                )
            )
        )
        before = self.relay
        self.relay = Relay(
            self._network,
            served.engine,
            model=self._checkpoint.fingerprint,
            span=span,
            hidden_size=self._checkpoint.hidden_size,
            hello=self._hello,
            limits=self._config.limits,
            retiring=self._retiring,
            on_load_change=self._on_change,
        )
        self.served, self.span, self.state = served, span, PeerState.ONLINE
        self.moving_to = None
        self._on_change()
        if before is not None and old is not None:
            await self._retire(before, old)

    async def _retire(self, relay: Relay, served: Served) -> None:
        self._retiring.append(relay)
        try:
            await relay.leave(HAND_OVER_PATIENCE, "this node moves to other blocks")
        finally:
            self._retiring.remove(relay)
            served.engine.shutdown(timeout=0.0)

    def _relays(self) -> Iterator[Relay]:
        yield from self._retiring
        if self.relay is not None:
            yield self.relay
