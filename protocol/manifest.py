"""A model's manifest: what it consists of, by content hash. Its own hash is the model's identity.

A model is cut into **shards**: the small files that go with it (config, tokenizer), its two ends, and
each block. A shard is the bytes of its entries one behind the other: tensors as they are stored,
little-endian and row-major, in the order that safetensors has them in, or whole files. Shards are cut
into **chunks** of one size (the last is what is left), and the manifest has the SHA-256 of each. So
whoever knows the manifest can take any chunk from anybody, and whoever knows its hash, the
*fingerprint*, can take the manifest itself from anybody. How a checkpoint is cut into files, and
whether these are safetensors or pickles, changes nothing.

Rules of this file:

* What decodes takes bytes from strangers, and raises only ``RemoteProtocolError``. That their hash is
  the one asked for makes them no more harmless: whoever made the fingerprint up may be hostile.
* There is one encoding of a manifest; any other is refused.
* Sizes are checked before anything is built from them; what a manifest makes a reader hold is in
  proportion to its own bytes, and those are bounded.
* A file's name is on a list, so it is neither a path nor anything that could be executed.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgpack

from . import checks
from .checks import MAX_BLOCKS, BadValueError
from .errors import LocalProtocolError, RemoteProtocolError
from .span import Span

MAX_MANIFEST = 16 * 1024 * 1024
"""Bytes. BLOOM-176B's has 6 MB, nearly all of it hashes."""
MAX_TABLE = 4 * 1024 * 1024
"""Of these, what is no hash: small objects, which take fifty times their bytes in memory."""
MIN_CHUNK = 64 * 1024
MAX_CHUNK = 2 * 1024 * 1024
"""One fits a frame with room to spare, and takes a hundredth of a second to send."""
CHUNKS = 4096
"""About as many, of the least size that will do, has a model whose chunks are not of a limit's size."""
HASH_BYTES = 32
MAX_SHARD = 1 << 40
MAX_ENTRIES = 1 << 16
"""Tensors of one shard; a block with 512 experts has 1,500."""
MAX_DIMENSIONS = 8
MAX_NAME = 256
MAX_FILES_BYTES = 256 * 1024 * 1024
"""The largest tokenizers have 35 MB."""

FILE_NAMES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",  # a template that transformers renders in a sandbox
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
"""The files beside the weights: data, and nothing that transformers would execute."""

ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""What weights may be stored in, by torch's names, and how large an element is."""

FILES, ENDS, FIRST_BLOCK = 0, 1, 2
"""Numbers of shards; block ``n`` is shard ``FIRST_BLOCK + n``."""

SCHEME = "petals:"
"""What a model is called by its fingerprint: ``petals:`` and 64 hexadecimal digits."""

_VERSION = 1
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{MAX_NAME - 1}}}")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the checkpoint."""

    name: str
    """Canonical: without the ``transformer.`` or ``model.`` that some checkpoints put in front."""
    dtype: str
    """As stored, by torch's name."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return ELEMENT_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class File:
    """A small file that belongs to the model."""

    name: str
    size: int


@dataclass(frozen=True)
class Shard:
    """Entries whose bytes lie one behind the other, and the hashes of the chunks of that."""

    entries: tuple[Tensor, ...] | tuple[File, ...]
    hashes: bytes
    """32 bytes for each chunk."""

    def __repr__(self) -> str:
        return f"<Shard of {len(self.entries)} entries, {self.size} bytes>"

    @cached_property
    def size(self) -> int:
        """In bytes."""
        return sum(entry.size for entry in self.entries)

    @property
    def num_chunks(self) -> int:
        """How many chunks it has."""
        return len(self.hashes) // HASH_BYTES

    def hash_of(self, chunk: int) -> bytes:
        """The SHA-256 of a chunk."""
        return self.hashes[chunk * HASH_BYTES : (chunk + 1) * HASH_BYTES]

    @cached_property
    def digest(self) -> str:
        """What this shard is filed under: shards of one name have the same content."""
        packed: bytes = msgpack.packb([_plain_entries(self), self.hashes])
        return hashlib.sha256(packed).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What a model consists of."""

    chunk_bytes: int
    files: Shard
    ends: Shard
    blocks: tuple[Shard, ...]

    def __repr__(self) -> str:
        return f"<Manifest {self.fingerprint[:16]} of {len(self.blocks)} blocks, {self.size} bytes>"

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All of them, by number."""
        return (self.files, self.ends, *self.blocks)

    @cached_property
    def size(self) -> int:
        """Of the whole model, in bytes."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def encoded(self) -> bytes:
        """As it travels. Raises LocalProtocolError when it is no manifest that others would take."""
        table: bytes = msgpack.packb([_plain_entries(shard) for shard in self.shards])
        hashes = b"".join(shard.hashes for shard in self.shards)
        packed: bytes = msgpack.packb([_VERSION, self.chunk_bytes, table, hashes])
        try:
            _build(packed)
        except RemoteProtocolError as error:
            raise LocalProtocolError(str(error)) from None
        return packed

    @cached_property
    def fingerprint(self) -> str:
        """The model's identity: 64 hexadecimal digits."""
        return hashlib.sha256(self.encoded).hexdigest()

    def chunk_size(self, shard: int, chunk: int) -> int:
        """The bytes of one chunk of a shard."""
        return min(self.chunk_bytes, self.shards[shard].size - chunk * self.chunk_bytes)


def chunk_bytes_for(size: int) -> int:
    """The size of the chunks of a model of ``size`` bytes."""
    wanted = 1 << max(0, (size // CHUNKS - 1).bit_length())
    return min(MAX_CHUNK, max(MIN_CHUNK, wanted))


def chunks_of(size: int, chunk_bytes: int) -> int:
    """How many chunks ``size`` bytes make."""
    return -(-size // chunk_bytes)


def shards_of(span: Span) -> range:
    """The shards that are the blocks of ``span``."""
    return range(FIRST_BLOCK + span.start, FIRST_BLOCK + span.end)


def stored_order(tensor: Tensor) -> tuple[int, str]:
    """By what tensors are ordered: wide elements first, so that every tensor is aligned."""
    return -ELEMENT_BYTES[tensor.dtype], tensor.name


def parse_model(name: str) -> str | None:
    """The fingerprint in ``petals:FINGERPRINT``; None if the name is no such. Raises ValueError."""
    if not name.startswith(SCHEME):
        return None
    fingerprint = name.removeprefix(SCHEME)
    if re.fullmatch("[0-9a-f]{64}", fingerprint) is None:
        raise ValueError(
            f"{name!r} must be {SCHEME} and the 64 hexadecimal digits of a fingerprint"
        )
    return fingerprint


def decode_manifest(data: bytes, fingerprint: str) -> Manifest:
    """The manifest of a model. Raises RemoteProtocolError if the bytes are another's, or none."""
    if hashlib.sha256(data).hexdigest() != fingerprint:
        raise RemoteProtocolError(f"this is not the manifest of {fingerprint[:16]}")
    manifest = _build(data)
    if manifest.encoded != data:
        raise RemoteProtocolError("a manifest is not in its one encoding")
    return manifest


# --- to and from msgpack's own types --------------------------------------------------------------


def _plain_entries(shard: Shard) -> list[Any]:
    return [
        [entry.name, entry.size]
        if isinstance(entry, File)
        else [entry.name, entry.dtype, list(entry.shape)]
        for entry in shard.entries
    ]


def _build(data: bytes) -> Manifest:
    if len(data) > MAX_MANIFEST:
        raise RemoteProtocolError(f"a manifest of {len(data)} bytes is over {MAX_MANIFEST}")
    match _unpack(data):
        case [int(version), *_] if version != _VERSION:
            raise RemoteProtocolError(
                f"a manifest of version {version} is not understood by this node, which knows "
                f"version {_VERSION}: update it"
            )
        case [_, chunk_bytes, bytes(table), bytes(hashes)] if len(table) <= MAX_TABLE:
            shards = _unpack(table)
        case _:
            raise RemoteProtocolError("a manifest must be [version, chunk_bytes, table, hashes]")
    try:
        return _checked(chunk_bytes, shards, hashes)
    except BadValueError as bad:
        raise RemoteProtocolError(f"a manifest's {bad}") from None


def _unpack(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, max_array_len=MAX_ENTRIES, max_map_len=0, max_ext_len=0)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"a manifest is not valid msgpack: {error}") from None


def _checked(chunk_bytes: Any, shards: Any, hashes: bytes) -> Manifest:
    if type(chunk_bytes) is not int or not MIN_CHUNK <= chunk_bytes <= MAX_CHUNK:
        raise BadValueError(f"chunks must have {MIN_CHUNK} to {MAX_CHUNK} bytes")
    if not isinstance(shards, list) or not 1 <= len(shards) - FIRST_BLOCK <= MAX_BLOCKS:
        raise BadValueError(f"shards must be the files, the ends, and 1 to {MAX_BLOCKS} blocks")
    built, taken = [], 0
    for number, plain in enumerate(shards):
        if not isinstance(plain, list) or not plain:
            raise BadValueError("shards must have one entry at least")
        entries = _files(plain) if number == FILES else _tensors(plain)
        size = sum(entry.size for entry in entries)
        if size > (MAX_FILES_BYTES if number == FILES else MAX_SHARD):
            raise BadValueError(f"shards must have at most {MAX_SHARD} bytes, files fewer")
        end = taken + HASH_BYTES * chunks_of(size, chunk_bytes)
        built.append(Shard(entries, hashes[taken:end]))
        taken = end
    if taken != len(hashes):
        raise BadValueError("hashes must be one for each chunk")
    return Manifest(chunk_bytes, built[FILES], built[ENDS], tuple(built[FIRST_BLOCK:]))


def _files(plain: list[Any]) -> tuple[File, ...]:
    files = tuple(map(_file, plain))
    names = [file.name for file in files]
    if names != sorted(set(names)) or "config.json" not in names:
        raise BadValueError("files must be in the order of their names, config.json among them")
    return files


def _tensors(plain: list[Any]) -> tuple[Tensor, ...]:
    tensors = tuple(map(_tensor, plain))
    if list(tensors) != sorted(tensors, key=stored_order) or len(tensors) != len(
        {tensor.name for tensor in tensors}
    ):
        raise BadValueError("tensors must be in their order, each name once")
    return tensors


def _file(value: Any) -> File:
    match value:
        case [str(name), int(size)] if name in FILE_NAMES and 0 <= size <= MAX_FILES_BYTES:
            return File(name, size)
    raise BadValueError(
        f"files must be [name, size], with names from {', '.join(sorted(FILE_NAMES))}"
    )


def _tensor(value: Any) -> Tensor:
    match value:
        case [str(name), str(dtype), [*shape]] if (
            _NAME.fullmatch(name) and dtype in ELEMENT_BYTES and 1 <= len(shape) <= MAX_DIMENSIONS
        ):
            length = checks.integer(1, MAX_SHARD)
            return Tensor(name, dtype, tuple(length(item) for item in shape))
    raise BadValueError(
        f"tensors must be [name, dtype, shape] of {', '.join(ELEMENT_BYTES)} with up to "
        f"{MAX_DIMENSIONS} dimensions"
    )
