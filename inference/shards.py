"""A checkpoint as shards: its manifest, and the bytes of any chunk out of its own files.

What is hashed and handed out are tensors as they are stored, read in pieces: no more than a few MiB are
in memory at a time, whatever the size of a shard, and nothing depends on how the checkpoint is cut into
files. Those of a GGUF file are handed out dequantised, as they are computed with, one tensor of it in
memory at a time. The manifest of a large model takes minutes to make, so it is remembered for as long as
the files are the same.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import platformdirs
import torch

from ..protocol.errors import ModelError, RemoteProtocolError
from ..protocol.manifest import (
    FILE_NAMES,
    FILES,
    File,
    Manifest,
    Shard,
    Tensor,
    chunk_bytes_for,
    decode_manifest,
    stored_order,
)
from .hub import GgufSource, Source
from .progress import Progress, Step
from .weights import Stored, Weights, file_identity

logger = logging.getLogger(__name__)

_STEP = 4 * 1024 * 1024
"""Bytes of a tensor that are read at a time, or one row if that has more."""
_WORTH_REMEMBERING = 64 * 1024 * 1024
"""Bytes of a model; smaller ones are hashed in a moment."""
_OPENED = 256
"""Tensors that are kept at hand: chunks of a block or two are asked for in any order."""
_OPENED_IN_MEMORY = 2
"""The same of a GGUF file, where each of them is in memory as a whole."""

ReadFile = Callable[[str], bytes | None]
"""The content of one of the small files beside the weights; None: there is none. Raises ModelError."""


class ShardReader:
    """Chunks of a checkpoint, out of its own files. Safe to use from several threads."""

    def __init__(
        self, source: Source, weights: Weights, read_file: ReadFile, manifest: Manifest
    ) -> None:
        self._source = source
        self._weights = weights
        self._read_file = read_file
        self._manifest = manifest
        in_memory = isinstance(source, GgufSource)
        self._opened = lru_cache(_OPENED_IN_MEMORY if in_memory else _OPENED)(self._open)
        self._filenames = lru_cache(maxsize=None)(self._files_of)
        self._identities: dict[str, tuple[int, int, int]] = {}
        for filename in filter(source.local, weights.filenames):
            self._require_same(filename)

    def has(self, number: int) -> bool:
        """Whether all of a shard can be read without fetching anything."""
        return number == FILES or all(map(self._source.local, self._filenames(number)))

    def read(self, number: int, chunk: int) -> bytes:
        """The bytes of a chunk, as the files have them now. Raises ModelError."""
        start = chunk * self._manifest.chunk_bytes
        stop = start + self._manifest.chunk_size(number, chunk)
        parts, offset = [], 0
        for entry in self._manifest.shards[number].entries:
            first, last = max(start, offset), min(stop, offset + entry.size)
            if first < last:
                parts.append(self._piece(entry, first - offset, last - offset))
            offset += entry.size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def is_right(self, number: int, chunk: int) -> bool:
        """Whether a chunk is what the manifest says. Raises ModelError."""
        found = hashlib.sha256(self.read(number, chunk)).digest()
        return found == self._manifest.shards[number].hash_of(chunk)

    def _files_of(self, number: int) -> frozenset[str]:
        entries = self._manifest.shards[number].entries
        return frozenset(self._weights.filename(entry.name) for entry in entries)

    def _piece(self, entry: Tensor | File, start: int, stop: int) -> bytes:
        if isinstance(entry, Tensor):
            self._require_same(self._weights.filename(entry.name))
            stored = self._opened(entry.name)
            if stored.place is not None:
                return _read_piece(stored, stored.place, entry, start, stop)
            # A copy, made here: what is mapped would be read from the disk wherever it is sent from.
            return bytes(_piece(stored, entry, start, stop))
        content = self._read_file(entry.name)
        if content is None:
            raise ModelError(f"{self._source.name}: {self._source.missing(entry.name)}")
        return content[start:stop]

    def _require_same(self, filename: str) -> None:
        """Raise ModelError if a file is another than it was at first: its hashes would be wrong."""
        path = self._weights.path(filename)
        identity = file_identity(path)
        if self._identities.setdefault(filename, identity) != identity:
            raise ModelError(f"{path} has changed since it was opened; start again")

    def _open(self, name: str) -> Stored:
        return _only(self._weights, name)


def make_manifest(
    source: Source,
    weights: Weights,
    read_file: ReadFile,
    block_prefix: Callable[[int], str],
    num_blocks: int,
    *,
    memo: Path | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """The manifest of a checkpoint; reads all of it, unless that was done before.

    ``block_prefix``: what the names of a block's tensors begin with. ``memo``: where manifests are
    remembered; None: in the user's cache. Raises ModelError.
    """
    path = _memo(weights, read_file, num_blocks, memo)
    manifest = _remembered(path)
    if manifest is None:
        manifest = _make(source, weights, read_file, block_prefix, num_blocks, progress)
        if manifest.size >= _WORTH_REMEMBERING:
            _remember(path, manifest)
    return manifest


def known_manifest(weights: Weights, read_file: ReadFile, num_blocks: int) -> Manifest | None:
    """The manifest of a checkpoint whose files are here, if it was made before."""
    return _remembered(_memo(weights, read_file, num_blocks, None))


def _make(
    source: Source,
    weights: Weights,
    read_file: ReadFile,
    block_prefix: Callable[[int], str],
    num_blocks: int,
    progress: Progress | None,
) -> Manifest:
    prefixes = {block_prefix(block): block for block in range(num_blocks)}
    depth = next(iter(prefixes)).count(".")
    names: list[list[str]] = [[] for _ in range(1 + num_blocks)]
    for name in weights.names:
        prefix = "".join(part + "." for part in name.split(".")[:depth])
        block = prefixes.get(prefix)
        names[0 if block is None else 1 + block].append(name)
    described = [_described(weights, part) for part in names]
    for part, tensors in enumerate(described):
        if not tensors:
            what = f"block {part - 1}" if part else "ends"
            raise ModelError(f"{source.name}: the weights hold nothing of its {what}")
    contents = {
        name: content for name in sorted(FILE_NAMES) if (content := read_file(name)) is not None
    }
    files = tuple(File(name, len(content)) for name, content in contents.items())
    size = sum(file.size for file in files) + sum(each.size for part in described for each in part)
    chunk_bytes = chunk_bytes_for(size)
    shards = [Shard(files, _hashes(contents.values(), chunk_bytes))]
    for tensors in described:
        if progress is not None:
            done = sum(shard.size for shard in shards)
            progress(Step(f"hashing {source.name}", done, size, "bytes"))
        pieces = (piece for each in tensors for piece in _pieces(_only(weights, each.name), each))
        shards.append(Shard(tuple(tensors), _hashes(pieces, chunk_bytes)))
    if progress is not None:
        progress(Step(f"hashing {source.name}", size, size, "bytes"))
    return Manifest(chunk_bytes, shards[0], shards[1], tuple(shards[2:]))


def _only(weights: Weights, name: str) -> Stored:
    ((_, stored),) = weights.read([name])
    return stored


def _described(weights: Weights, names: Iterable[str]) -> list[Tensor]:
    """The tensors of a shard in their order; those that no weights are, such as masks, left out."""
    tensors = []
    for name, stored in weights.read(names):
        if stored.dtype is not None and stored.shape.numel() and len(stored.shape):
            dtype = str(stored.dtype).removeprefix("torch.")
            tensors.append(Tensor(name, dtype, tuple(stored.shape)))
    return sorted(tensors, key=stored_order)


def _pieces(stored: Stored, tensor: Tensor) -> Iterator[memoryview]:
    row = tensor.size // tensor.shape[0]
    step = row * max(1, _STEP // row)
    for start in range(0, tensor.size, step):
        yield _piece(stored, tensor, start, min(start + step, tensor.size))


def _read_piece(
    stored: Stored, place: tuple[Path, int], tensor: Tensor, start: int, stop: int
) -> bytes:
    """Bytes ``start..stop-1`` of a tensor that lies in a file as it is; to map it would cost more."""
    _require_described(stored, tensor)
    path, offset = place
    try:
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), stop - start, offset + start)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) < stop - start:
        raise ModelError(f"{path} is cut off")
    return data


def _require_described(stored: Stored, tensor: Tensor) -> None:
    if (tuple(stored.shape), stored.dtype) != (tensor.shape, getattr(torch, tensor.dtype)):
        raise ModelError(f"the tensor {tensor.name} is another in the files than in the manifest")


def _piece(stored: Stored, tensor: Tensor, start: int, stop: int) -> memoryview:
    """Bytes ``start..stop-1`` of a tensor."""
    _require_described(stored, tensor)
    row = tensor.size // tensor.shape[0]
    first = start // row
    rows = stored.rows(first, -(-stop // row)).contiguous()
    data: memoryview = rows.reshape(-1).view(torch.uint8).numpy().data
    return data[start - first * row : stop - first * row]


def _hashes(pieces: Iterable[bytes | memoryview], chunk_bytes: int) -> bytes:
    """The SHA-256 of each chunk of what the pieces are together."""
    hashes: list[bytes] = []
    chunk, left = hashlib.sha256(), chunk_bytes
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            chunk.update(rest[:left])
            taken = min(left, len(rest))
            rest, left = rest[taken:], left - taken
            if not left:
                hashes.append(chunk.digest())
                chunk, left = hashlib.sha256(), chunk_bytes
    if left < chunk_bytes:
        hashes.append(chunk.digest())
    return b"".join(hashes)


def read_small_file(source: Source, name: str) -> bytes | None:
    """A ``ReadFile``, of a source that has these as files."""
    path = source.find(name)
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _memo(weights: Weights, read_file: ReadFile, num_blocks: int, folder: Path | None) -> Path:
    """Where a manifest is remembered; elsewhere when any file is another, or what is read of it."""
    paths = (weights.path(filename) for filename in weights.filenames)
    large = [(str(path.absolute()), *file_identity(path)) for path in paths]
    small = [hashlib.sha256(read_file(name) or b"").hexdigest() for name in sorted(FILE_NAMES)]
    identity = json.dumps([num_blocks, weights.names, large, small])
    folder = folder or platformdirs.user_cache_path("petals-node") / "manifests"
    return folder / hashlib.sha256(identity.encode()).hexdigest()


def _remembered(path: Path) -> Manifest | None:
    try:
        data = path.read_bytes()
        return decode_manifest(data[64:], data[:64].decode("ascii", errors="replace"))
    except FileNotFoundError:
        return None
    except (OSError, RemoteProtocolError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return None


def _remember(path: Path, manifest: Manifest) -> None:
    """Atomic: several nodes of this machine may do it at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(manifest.fingerprint.encode() + manifest.encoded)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)
