"""What this node has of one model's weights, for itself and for others; and getting what it lacks.

A model that was opened from a folder or the hub is given to others out of its own files. One that is
known by its fingerprint alone is fetched from peers into the data directory (``shard_store.py``), where
it stays for others, and for the next start, until room is needed.

Rules of this file: what a node gives, it has hashed since it was started, or opened from its user's own
files. Disk and hashing run in worker threads.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ..protocol.announcement import MAX_SHARD_RUNS, Announcement
from ..protocol.errors import ErrorCode, ModelError, PeerError, RemoteProtocolError
from ..protocol.frames import Hello
from ..protocol.holdings import everything
from ..protocol.manifest import SCHEME, Manifest
from ..protocol.span import Span
from ..protocol.swarm import Swarm
from .network import Network
from .shard_fetch import LOOK_SECONDS, Fetching, Find, ShardFetch, ban, fetch_manifest
from .shard_store import ShardStore, kept_manifest
from .wakeup import open_flat_nursery

if TYPE_CHECKING:
    from ..inference.checkpoint import Checkpoint
    from ..inference.progress import Progress
    from ..inference.shards import ShardReader

MODELS_OF_A_NAME = 4
"""Somebody may call anything by the name; what is most common is looked at."""
PEERS_OF_A_MODEL = 8
ROUND_SECONDS = 60.0
"""For the manifest of one model from all who may have it; BLOOM-176B's has 6 MB."""
NEXT_PEER_SECONDS = 1.0
"""A peer that has not sent a manifest by then gets company: it may be slow, or say nothing."""

logger = logging.getLogger(__name__)


class OwnWeights:
    """Those of a model that was opened from its user's own files.

    If the manifest was not made from these, because most of them are still on the hub or reading them
    takes minutes, what is used is compared with it first, and nothing else is given to others.
    """

    def __init__(self, reader: "ShardReader", manifest: Manifest, *, adopted: bool = False) -> None:
        self.manifest = manifest
        self._reader = reader
        self._right: set[int] | None = set() if adopted else None

    async def ensure(self, what: str, numbers: Collection[int], *, patience: float) -> None:
        """Return when these shards are there. Raises ModelError if they are another model's."""
        del patience  # the hub has its own
        if self._right is not None:
            for number in sorted(set(numbers) - self._right):
                if not await trio.to_thread.run_sync(self._is_right, number):
                    raise ModelError(
                        f"the {what} that are here are not those of the swarm's model of that name "
                        f"(fingerprint {self.manifest.fingerprint[:16]}): it was made from other weights; "
                        f"{SCHEME} and its fingerprint as the model fetches those"
                    )
                self._right.add(number)

    def _is_right(self, number: int) -> bool:
        chunks = range(self.manifest.shards[number].num_chunks)
        return all(self._reader.is_right(number, chunk) for chunk in chunks)

    def bits(self, number: int) -> bytes:
        """Which chunks of a shard there are."""
        return everything(self.manifest.shards[number].num_chunks) if self.has(number) else b""

    def has(self, number: int) -> bool:
        """Whether a shard is there as a whole."""
        return self._reader.has(number) and (self._right is None or number in self._right)

    def read(self, number: int, chunk: int) -> bytes | None:
        """A chunk. Blocks. Raises ModelError."""
        return self._reader.read(number, chunk) if self.has(number) else None


class FetchedWeights:
    """Those of a model that is fetched from peers."""

    def __init__(
        self,
        store: ShardStore,
        make_fetch: Callable[[ShardStore], ShardFetch],
        on_change: Callable[[], None],
        progress: "Progress | None",
    ) -> None:
        """``on_change`` is called when there is more to give to others.

        ``progress`` is told how far a fetch is; None: nobody is.
        """
        self.manifest = store.manifest
        self.fetched: list[Fetching] = []
        """Those that are complete."""
        self._store = store
        self._make_fetch = make_fetch
        self._on_change = on_change
        self._progress = progress
        self._used: dict[str, frozenset[int]] = {}
        self._lock = trio.Lock()

    def bits(self, number: int) -> bytes:
        """Which chunks of a shard there are."""
        return self._store.bits(number)

    def has(self, number: int) -> bool:
        """Whether a shard is there as a whole."""
        return self._store.has(number)

    def read(self, number: int, chunk: int) -> bytes | None:
        """A chunk, None if it is not there. Blocks."""
        return self._store.read(number, chunk)

    async def ensure(self, what: str, numbers: Collection[int], *, patience: float) -> None:
        """Return when these shards are there; they stay until others are asked for as ``what``.

        Raises ConfigError or ModelError when the disk does not hold them, PeerError when nothing of
        them has come for ``patience`` seconds.
        """
        async with self._lock:
            self._used[what] = frozenset(numbers)
            used = frozenset().union(*self._used.values())
            await trio.to_thread.run_sync(self._store.use, used)
            have = {
                number: await trio.to_thread.run_sync(self._store.open, number)
                for number in sorted(numbers)
            }
            await trio.to_thread.run_sync(self._store.make_room, numbers)
            total = sum(self.manifest.shards[number].size for number in numbers)
            missing = {
                number: set(range(self.manifest.shards[number].num_chunks)) - chunks
                for number, chunks in have.items()
            }
            kept = total - sum(
                self.manifest.chunk_size(number, chunk)
                for number, chunks in missing.items()
                for chunk in chunks
            )
            fetching = Fetching(what, total, kept, kept, self._progress)
            await self._make_fetch(self._store).run(missing, fetching, patience=patience)
            self.fetched.append(fetching)
        self._on_change()

    async def check_rest(self) -> None:
        """Hash what else of the model is on the disk, so that it can be given to others."""
        for number in range(len(self.manifest.shards)):
            try:
                await trio.to_thread.run_sync(self._store.open, number)
            except ModelError as error:
                logger.warning("%s", error)
        self._on_change()

    def close(self) -> None:
        """Let others remove what is on the disk."""
        self._store.close()


Weights = OwnWeights | FetchedWeights


def runs_to_give(weights: Weights) -> tuple[Span, ...]:
    """The shards that are there as a whole, as runs; of very many the longest."""
    runs: list[Span] = []
    for number in range(len(weights.manifest.shards)):
        if not weights.has(number):
            continue
        if runs and runs[-1].end == number:
            runs[-1] = Span(runs[-1].start, number + 1)
        else:
            runs.append(Span(number, number + 1))
    longest = sorted(runs, key=lambda run: (-len(run), run))[:MAX_SHARD_RUNS]
    return tuple(sorted(longest))


async def find_manifest(
    fingerprint: str,
    folder: Path,
    *,
    network: Network,
    swarm: Swarm,
    find: Find,
    hello: Hello,
    clock: Callable[[], float],
    patience: float,
) -> Manifest:
    """The manifest of a model: from the disk, or from whoever has it. Raises PeerError."""
    kept = await trio.to_thread.run_sync(kept_manifest, folder, fingerprint)
    if kept is not None:
        return kept
    reason = "no peer gives it"
    until = trio.current_time() + patience
    while True:
        try:
            found = await find()
        except PeerError as error:
            reason, found = str(error), []
        manifest = None
        with trio.move_on_at(max(until, trio.current_time() + ROUND_SECONDS)):
            manifest = await _ask_in_turn(found, fingerprint, network, swarm, hello, clock)
        if manifest is not None:
            return manifest
        if trio.current_time() >= until:
            raise PeerError(
                f"the model {SCHEME}{fingerprint} was not found in this swarm within {patience:g} s "
                f"({reason}): is the fingerprint right, and does a node give it "
                "(`petals-node seed`)?",
                code=ErrorCode.TIMEOUT,
            )
        await trio.sleep(min(LOOK_SECONDS, patience))


async def _ask_in_turn(
    peers: Sequence[Announcement],
    fingerprint: str,
    network: Network,
    swarm: Swarm,
    hello: Hello,
    clock: Callable[[], float],
) -> Manifest | None:
    """The first manifest that one of the peers sends; one that takes long gets company."""
    manifests: list[Manifest] = []

    async def ask(peer: Announcement, ended: trio.Event, others: trio.CancelScope) -> None:
        try:
            manifests.append(await fetch_manifest(network, peer, fingerprint, hello))
            others.cancel()
        except RemoteProtocolError as error:
            ban(swarm, peer.peer_id, error)
        except PeerError as error:
            logger.info("peer %s gives no manifest: %s", peer.peer_id, error)
            swarm.failed(peer.peer_id, clock())
        ended.set()

    async with open_flat_nursery() as nursery:
        for peer in peers:
            if swarm.usable(peer.peer_id, clock()):
                ended = trio.Event()
                nursery.start_soon(ask, peer, ended, nursery.cancel_scope)
                with trio.move_on_after(NEXT_PEER_SECONDS):
                    await ended.wait()
    return manifests[0] if manifests else None


async def adopt_manifest(
    checkpoint: "Checkpoint",
    peers: Sequence[Announcement],
    *,
    network: Network,
    swarm: Swarm,
    hello: Hello,
    clock: Callable[[], float],
) -> bool:
    """Find the manifest of a model among these peers, and take it for the checkpoint's if it agrees.

    They call theirs by the same name; what most of them have comes first. Making one instead takes
    all of the files.
    """
    counts = Counter(peer.model for peer in peers)
    for fingerprint, _ in counts.most_common(MODELS_OF_A_NAME):
        same = [peer for peer in peers if peer.model == fingerprint][:PEERS_OF_A_MODEL]
        manifest = None
        with trio.move_on_after(ROUND_SECONDS):
            manifest = await _ask_in_turn(same, fingerprint, network, swarm, hello, clock)
        if manifest is not None and await trio.to_thread.run_sync(checkpoint.adopt, manifest):
            return True
    return False


def name_of(peers: Sequence[Announcement], fingerprint: str) -> str:
    """What most peers call the model; it is only a name."""
    names = Counter(peer.model_name for peer in peers)
    return names.most_common(1)[0][0] if names else f"{SCHEME}{fingerprint[:16]}"
