"""Opening the model that a node is for: out of its user's files, off the hub, or from peers.

Rules of this file: whoever serves or uses a few blocks of a large model never reads all of it for its
fingerprint, if somebody in the swarm has its manifest. What is said of a model then is checked against
the weights as they come (``weights.py``).
"""

import contextlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ..protocol.announcement import Announcement
from ..protocol.dice import Dice
from ..protocol.errors import ModelError, PeerError
from ..protocol.frames import Hello
from ..protocol.manifest import FILES, SCHEME, Manifest
from ..protocol.swarm import Swarm
from .config import NodeConfig
from .membership import Membership
from .network import Network
from .shard_fetch import ReadOwn, ShardFetch
from .shard_store import ShardStore
from .weights import (
    FetchedWeights,
    OwnWeights,
    Weights,
    adopt_manifest,
    find_manifest,
    name_of,
)

if TYPE_CHECKING:
    from ..inference.checkpoint import Checkpoint
    from ..inference.progress import Progress
    from .originate import Compute

logger = logging.getLogger(__name__)

FALLBACK_PATIENCE = 3.0
"""Seconds until a model's manifest is taken from the fallback that no peer has given."""
LOOK_SECONDS = 2.0
"""Between two looks at whether somebody has the model."""
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that was opened."""

    checkpoint: "Checkpoint"
    name: str
    """What the swarm is told that it is called."""
    weights: Weights


@dataclass(frozen=True, slots=True)
class Opener:
    """What opening a model takes."""

    config: NodeConfig
    network: Network
    membership: Membership
    swarm: Swarm
    hello: Hello
    clock: Callable[[], float]
    dice: Dice
    compute: "Compute"
    progress: "Progress | None"

    async def open(self) -> Opened:
        """Open the model of the configuration. Raises ConfigError, ModelError, PeerError."""
        fingerprint = self.config.fetched_model
        return await (self._open_own() if fingerprint is None else self._open_fetched(fingerprint))

    # --- a folder, a file, the hub ------------------------------------------------------------

    async def _open_own(self) -> Opened:
        def load() -> "tuple[Checkpoint, str, bool]":
            from . import serving

            checkpoint = serving.open_model(self.config, self.progress)
            return checkpoint, serving.announced_name(checkpoint), checkpoint.quick

        checkpoint, name, quick = await self.compute(load)
        adopted = not quick and await self._adopted(checkpoint, name)
        if not (quick or adopted):
            self._before_reading_all(checkpoint, name)
        try:
            manifest = await self.compute(lambda: checkpoint.manifest)
        except ModelError as error:
            if checkpoint.complete:
                raise
            raise ModelError(
                f"{error}. Without all of its files, {name} is known only by its fingerprint: give "
                f"{SCHEME} and that as the model, or join a swarm that has it"
            ) from error
        return Opened(checkpoint, name, OwnWeights(checkpoint.shards, manifest, adopted=adopted))

    async def _adopted(self, checkpoint: "Checkpoint", name: str) -> bool:
        """Learn from the swarm what a model consists of that would take long to read.

        Who serves none of it can do nothing until somebody has it, so waits. Raises PeerError.
        """
        until = trio.current_time() + (0.0 if self.config.serve else self.config.patience)
        while True:
            with contextlib.suppress(PeerError):
                peers = await self.membership.find(name)
                if await adopt_manifest(
                    checkpoint,
                    peers,
                    network=self.network,
                    swarm=self.swarm,
                    hello=self.hello,
                    clock=self.clock,
                ):
                    return True
            if self.config.serve or checkpoint.complete:
                return False
            if trio.current_time() >= until:
                raise PeerError(
                    f"nobody in this swarm has {name} as the hub has it; if it is called otherwise "
                    f"there, give {SCHEME} and its fingerprint as the model"
                )
            await trio.sleep(min(LOOK_SECONDS, self.config.patience))

    def _before_reading_all(self, checkpoint: "Checkpoint", name: str) -> None:
        """Say what will take long. Raises ModelError when the disk cannot hold it."""
        size = checkpoint.stored_bytes
        amount = "all" if size is None else f"all {size / 1e9:.1f} GB"
        others = (
            f"once a node has done so (`petals-node seed --model {checkpoint.name}`), others fetch "
            f"only what they need, with its fingerprint ({SCHEME}…) or, from the hub, by its name"
        )
        if checkpoint.complete:
            logger.warning(
                "reading %s of %s, once, to find out its fingerprint; %s", amount, name, others
            )
            return
        if checkpoint.local_only:
            return  # what is missing will be named
        free = shutil.disk_usage(checkpoint.folder).free
        if size is not None and size > free:
            raise ModelError(
                f"nobody in this swarm has {name}, and to find out its fingerprint takes {amount} of "
                f"it, for which {checkpoint.folder} has no room ({free / 1e9:.1f} GB are free); {others}"
            )
        logger.warning(
            "nobody in this swarm has %s: downloading %s of it, once, to find out its fingerprint; %s",
            name,
            amount,
            others,
        )

    # --- from peers ---------------------------------------------------------------------------

    async def _open_fetched(self, fingerprint: str) -> Opened:
        """Open a model of which nothing but the fingerprint is known."""
        config, folder = self.config, self.config.data_dir / "weights"
        manifest = await self._find_manifest(fingerprint, folder)
        space = config.max_disk_space
        most = None if space is None else int(space * GIB)
        store = await trio.to_thread.run_sync(partial(ShardStore, folder, manifest, max_bytes=most))
        fetch = partial(self._make_fetch, await self._fallback(manifest))
        weights = FetchedWeights(store, fetch, self.membership.changed, self.progress)
        try:
            await weights.ensure("files", [FILES], patience=config.patience)
            small_files = await trio.to_thread.run_sync(store.unpack_files)

            def load() -> "Checkpoint":
                from . import serving

                assert config.model is not None
                return serving.open_from_peers(
                    config.model, small_files, store.shards, manifest, self.progress
                )

            checkpoint = await self.compute(load)
        except BaseException:
            weights.close()
            raise
        name = name_of(self.swarm.peers(self.clock(), fingerprint), fingerprint)
        return Opened(checkpoint, name, weights)

    async def _find_manifest(self, fingerprint: str, folder: Path) -> Manifest:
        config = self.config
        try:
            return await find_manifest(
                fingerprint,
                folder,
                network=self.network,
                swarm=self.swarm,
                find=partial(self._holders, fingerprint, None),
                hello=self.hello,
                clock=self.clock,
                patience=config.patience if config.fallback is None else FALLBACK_PATIENCE,
            )
        except PeerError:
            if config.fallback is None:
                raise
            return await self._manifest_of_fallback(config.fallback, fingerprint)

    async def _manifest_of_fallback(self, name: str, fingerprint: str) -> Manifest:
        def make() -> Manifest:
            from . import serving

            return serving.open_fallback(name, None, self.progress).manifest

        manifest = await self.compute(make)
        if manifest.fingerprint != fingerprint:
            raise ModelError(
                f"no peer has the model {SCHEME}{fingerprint}, and the fallback {name} is another one "
                f"({SCHEME}{manifest.fingerprint})"
            )
        return manifest

    async def _fallback(self, manifest: Manifest) -> ReadOwn | None:
        name = self.config.fallback
        if name is None:
            return None

        def load() -> ReadOwn:
            from . import serving

            return serving.open_fallback(name, manifest).shards.read

        return await self.compute(load)

    def _make_fetch(self, fallback: ReadOwn | None, store: ShardStore) -> ShardFetch:
        manifest = store.manifest
        return ShardFetch(
            store,
            network=self.network,
            swarm=self.swarm,
            hello=self.hello,
            find=partial(self._holders, manifest.fingerprint, len(manifest.blocks)),
            clock=self.clock,
            dice=self.dice,
            fallback=fallback,
        )

    async def _holders(self, fingerprint: str, num_blocks: int | None) -> list[Announcement]:
        """Who may have weights of a model; those first who say that they have some."""
        error: PeerError | None = None
        try:
            await self.membership.holders(fingerprint)
        except PeerError as failure:
            error = failure
        if num_blocks is not None:
            with contextlib.suppress(PeerError):
                await self.membership.refresh(fingerprint, num_blocks)
        found = self.swarm.peers(self.clock(), fingerprint)
        if not found and error is not None:
            raise error
        return sorted(found, key=lambda peer: (not peer.shards, self.dice.random()))
