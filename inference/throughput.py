"""How fast this machine runs a block, for its announcements.

A quick measurement, meant to rank peers, not to be exact: it takes well under a second for a
small model and at least one step of each kind for a large one.
"""

import time
from dataclasses import dataclass

import torch

from .attention import LaneRows
from .cache import LaneCache
from .model import Blocks

_SECONDS = 0.2
"""About how long each of the two measurements goes on."""
_PREFILL_ROWS = 64
"""Decoding is measured behind as many tokens."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens per second through *one* block, for one session."""

    decode: float
    prefill: float


@torch.inference_mode()
def measure(blocks: Blocks) -> Throughput:
    """Measure ``blocks``; call it before an engine runs them, or its steps count against us."""
    cache = LaneCache(blocks.cache_shape, _PREFILL_ROWS + 1)
    prefill = _rate(blocks, cache, rows=_PREFILL_ROWS)
    cache.length = _PREFILL_ROWS
    decode = _rate(blocks, cache, rows=1)
    return Throughput(decode=decode, prefill=prefill)


def _rate(blocks: Blocks, cache: LaneCache, *, rows: int) -> float:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, rows, blocks.hidden_size), generator=generator)
    hidden = hidden.to(dtype=blocks.dtype, device=blocks.device)
    _step(blocks, cache, hidden)  # allocates, and chooses kernels
    begin = time.perf_counter()
    steps, elapsed = 0, 0.0
    while elapsed < _SECONDS:
        _step(blocks, cache, hidden)
        steps += 1
        elapsed = time.perf_counter() - begin
    return steps * rows * len(blocks.span) / elapsed


def _step(blocks: Blocks, cache: LaneCache, hidden: torch.Tensor) -> None:
    """One run over the same cached tokens each time: the length is never raised."""
    blocks.run(hidden, blocks.plan([LaneRows(cache, hidden.shape[1])]))
    if blocks.device.type == "cuda":
        torch.cuda.synchronize(blocks.device)
