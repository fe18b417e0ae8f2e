"""How fast this machine runs a block, for its announcements and for people.

Decoding is measured for 1, 8 and 32 sessions that share a batch, and prefill for one. That takes a
few seconds at most, and is remembered per model, precision, device and versions, so that a node
that starts again does not measure again. Speeds are of *one* block, the mean over those measured.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..protocol.span import Span
from .attention import LaneRows
from .cache import LaneCache
from .measured import circumstances, read, write
from .model import Blocks

logger = logging.getLogger(__name__)

_SECONDS = 0.2
"""About how long each of the four measurements goes on, beyond one run for warming up."""
_PREFILL_ROWS = 128
"""Decoding is measured behind as many tokens."""
_BATCHES = (1, 8, 32)
_BLOCKS = 4
"""At most so many blocks are run: enough that weights come from memory, few enough to be quick."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens per second through *one* block, of all sessions together."""

    decode: float
    """Of a session that decodes alone."""
    decode_8: float
    """Of 8 sessions that decode together."""
    decode_32: float
    """Of 32 sessions that decode together."""
    prefill: float
    """Of one prompt."""

    def scaled_to(self, decode: float) -> "Throughput":
        """What a machine would do that is as much slower, or faster, in everything."""
        factor = decode / self.decode
        return Throughput(
            decode, self.decode_8 * factor, self.decode_32 * factor, self.prefill * factor
        )


@torch.inference_mode()
def measure(blocks: Blocks) -> Throughput:
    """Measure ``blocks``; call it before an engine runs them, or its steps count against us."""
    caches = [LaneCache(blocks.cache_shape, _PREFILL_ROWS + 1) for _ in range(max(_BATCHES))]
    prefill = _rate(blocks, caches[:1], rows=_PREFILL_ROWS)
    for cache in caches:
        cache.length = _PREFILL_ROWS  # what is in it does not matter for the time
    alone, some, many = (_rate(blocks, caches[:batch], rows=1) for batch in _BATCHES)
    return Throughput(decode=alone, decode_8=some, decode_32=many, prefill=prefill)


def remembered(blocks: Blocks, *, model: str, precision: str, folder: Path) -> Throughput:
    """``measure``, or what it gave the last time; ``folder`` keeps it.

    ``model`` is its fingerprint. A file that cannot be read or written costs a measurement only.
    """
    path = folder / "throughput.json"
    key = circumstances(model, precision, device=blocks.device)
    known = read(path)
    try:
        return Throughput(**known[key])
    except KeyError:
        pass
    except TypeError as error:
        logger.warning("%s is ignored: %s", path, error)
    measured = measure(blocks)
    write(path, known | {key: asdict(measured)})
    return measured


def _rate(blocks: Blocks, caches: Sequence[LaneCache], *, rows: int) -> float:
    """Tokens per second through one block, with ``rows`` of each cache in the batch."""
    span = Span(blocks.span.start, min(blocks.span.end, blocks.span.start + _BLOCKS))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, len(caches) * rows, blocks.hidden_size), generator=generator)
    hidden = hidden.to(dtype=blocks.dtype, device=blocks.device)

    def step() -> None:
        """One run over the same cached tokens each time: the lengths are never raised."""
        blocks.run(hidden, blocks.plan([LaneRows(cache, rows) for cache in caches]), span)
        if blocks.device.type == "cuda":
            torch.cuda.synchronize(blocks.device)

    step()  # allocates, and chooses kernels
    begin = time.perf_counter()
    steps, elapsed = 0, 0.0
    while elapsed < _SECONDS:
        step()
        steps += 1
        elapsed = time.perf_counter() - begin
    return steps * hidden.shape[1] * len(span) / elapsed
