"""A model of random bytes, cut into shards, without torch: what a fetch is tested with."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random  # noqa: TID251 - tests throw dice with known seeds

from petals.protocol.holdings import everything
from petals.protocol.manifest import MIN_CHUNK, File, Manifest, Shard, Tensor


@dataclass(frozen=True)
class RandomModel:
    """Blocks of ``chunks`` chunks each; the last chunk of each is half full."""

    num_blocks: int = 3
    chunks: int = 4
    seed: int = 0

    @cached_property
    def contents(self) -> list[bytes]:
        """The bytes of each shard."""
        dice = Random(self.seed)
        sizes = [900, MIN_CHUNK, *(self._block_size for _ in range(self.num_blocks))]
        return [dice.randbytes(size) for size in sizes]

    @cached_property
    def manifest(self) -> Manifest:
        files = (File("config.json", 500), File("tokenizer.json", 400))
        blocks = (
            (Tensor(f"h.{block}.w", "float16", (self._block_size // 2,)),)
            for block in range(self.num_blocks)
        )
        hashes = [_hashes(content) for content in self.contents]
        ends = (Tensor("ends.w", "float32", (MIN_CHUNK // 4,)),)
        return Manifest(
            MIN_CHUNK,
            Shard(files, hashes[0]),
            Shard(ends, hashes[1]),
            tuple(Shard(*each) for each in zip(blocks, hashes[2:], strict=True)),
        )

    @property
    def _block_size(self) -> int:
        return self.chunks * MIN_CHUNK - MIN_CHUNK // 2

    # --- as a holder --------------------------------------------------------------------------

    def bits(self, number: int) -> bytes:
        return everything(self.manifest.shards[number].num_chunks)

    def read(self, number: int, chunk: int) -> bytes:
        return self.contents[number][chunk * MIN_CHUNK : (chunk + 1) * MIN_CHUNK]


def _hashes(content: bytes) -> bytes:
    chunks: Sequence[bytes] = [
        content[start : start + MIN_CHUNK] for start in range(0, len(content), MIN_CHUNK)
    ]
    return b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
