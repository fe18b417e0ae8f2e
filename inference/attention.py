"""Ragged attention: rows of many sessions in one batch, each row on its own session's KV cache.

A batch is ``[1, rows, hidden]``: the rows of several lanes behind one another, so that everything
but attention runs on all of them at once. Attention is a loop over the lanes, each on its own
contiguous keys and values; measured faster than padding, jagged tensors or paged KV. Within a lane
it is causal. It is two matrix products along the cached tokens with a softmax between them: for a
single row, as in decoding, that reads the cache at close to memory speed, and for many it is level
with ``scaled_dot_product_attention``, which wants the cache copied into another order first.

ALiBi biases are fp32 and relative to the newest token (softmax doesn't see the shift), because
absolute ones round away in 16 bits. On a CPU, attention is computed in fp32, and a 16-bit cache is
widened group of heads by group of heads, into memory that is used again and again: faster than
16-bit arithmetic there, and as exact as the cache is. All lanes that decode go into one call of
``native.c`` where that can be had: in the loop, half of their time is the calls' own.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .cache import LaneCache
from .kernels import least_seconds
from .native import native

_SCRATCH_BYTES = 32 * 2**20
"""About how much a group of heads may take in masks, keys and values. Small enough to stay near the
processor, large enough that few groups are needed."""
_DECODE_SCRATCH_BYTES = 4 * 2**20
"""The same for a single row, which reads each of them only once: what a cache level holds."""
_FEW_ROWS = 8
"""Up to here a product along the cache is bound by reading it; beyond, by arithmetic."""


class AlibiBias:
    """The ALiBi bias by distance, for all lanes and blocks: a slice of one growing table."""

    def __init__(self, slopes: torch.Tensor) -> None:
        """``slopes``: fp32 ``[heads]``."""
        self.slopes = slopes
        self._table = slopes.new_zeros((slopes.shape[0], 1, 0))

    def last(self, length: int) -> torch.Tensor:
        """fp32 ``[heads, 1, length]``: what the newest of ``length`` tokens adds to each score."""
        capacity = self._table.shape[2]
        if length > capacity:
            capacity = max(length, 2 * capacity, 256)
            distance = torch.arange(1 - capacity, 1, device=self.slopes.device)
            self._table = self.slopes[:, None, None] * distance
        return self._table[:, :, capacity - length :]


class Scratch:
    """Memory for what lives no longer than one group of heads.

    Large buffers from the allocator are fresh pages every time, which costs more than what is done
    with them. Not thread-safe.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; void with the next ``take`` of the same name."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            grown = size if buffer is None else max(size, 2 * buffer.numel())
            buffer = torch.empty(grown, dtype=dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(*shape)


@dataclass(frozen=True, slots=True)
class LaneRows:
    """``rows`` consecutive rows of a batch that belong to one lane, behind what it has cached."""

    cache: LaneCache
    rows: int


@dataclass(frozen=True, slots=True)
class _Lane:
    """What all blocks need to know of a lane that goes through the loop."""

    cache: LaneCache
    first: int
    """The first of its rows in the batch."""
    rows: int
    bias: torch.Tensor | None
    """fp32 ``[heads, 1, length]``, or None without ALiBi."""
    causal: torch.Tensor | None
    """fp32 ``[rows, length]`` of 0 and -inf, or None for a single row."""


class Plan:
    """Whose rows are whose in one ragged batch; shared by all blocks that the batch runs through.

    Valid for one run: the masks are made from the lanes' lengths at its beginning.
    """

    def __init__(self, lanes: Sequence[LaneRows], bias: AlibiBias | None, scratch: Scratch) -> None:
        self.lanes = tuple(lanes)
        self.rows = sum(lane.rows for lane in self.lanes)
        self.scratch = scratch
        self.slopes = None if bias is None else bias.slopes
        """fp32 ``[heads]`` of ALiBi."""
        self.decoding: list[tuple[LaneCache, int]] = []
        """Lanes that go together, each with its row."""
        self.looped: list[_Lane] = []
        """Lanes that go one by one."""
        first = 0
        for lane in self.lanes:
            if lane.rows == 1 and lane.cache.device.type == "cpu" and native() is not None:
                self.decoding.append((lane.cache, first))
            else:
                length = lane.cache.length + lane.rows
                added = None if bias is None else bias.last(length)
                mask = _causal_mask(lane)
                self.looped.append(_Lane(lane.cache, first, lane.rows, added, mask))
            first += lane.rows


def _causal_mask(lane: LaneRows) -> torch.Tensor | None:
    if lane.rows == 1:
        return None
    length = lane.cache.length + lane.rows
    device = lane.cache.device
    mask = torch.full((lane.rows, length), -torch.inf, device=device)
    return mask.triu_(lane.cache.length + 1)


def ragged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    plan: Plan,
    block: int,
    scale: float,
) -> torch.Tensor:
    """Attend each lane's rows to its cache, after writing their keys and values into it.

    ``query``, ``key``, ``value`` are ``[1, heads, rows, head_dim]`` in the dtype of the hidden
    states. Returns ``[1, rows, heads * head_dim]`` in the same dtype.
    """
    _, heads, rows, head_dim = query.shape
    output = query.new_empty((rows, heads, head_dim))
    queries = query[0]
    new_keys, new_values = key[0].transpose(1, 2), value[0].transpose(1, 2)
    if plan.decoding:
        _decode(queries, key[0], value[0], output, plan, block, scale)
    for lane in plan.looped:
        part = slice(lane.first, lane.first + lane.rows)
        keys, values = lane.cache.append(block, new_keys[:, :, part], new_values[:, :, part])
        _attend(
            queries[:, part],
            keys,
            values,
            _Scores(lane.bias, lane.causal, scale),
            plan.scratch,
            output[part].transpose(0, 1),
        )
    return output.view(1, rows, heads * head_dim)


def _decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    plan: Plan,
    block: int,
    scale: float,
) -> None:
    """All lanes of a single row; ``[heads, rows, head_dim]`` to ``[rows, heads, head_dim]``."""
    library = native()
    assert library is not None
    library.decode_attention(
        query,
        key,
        value,
        output,
        caches=[cache.make_room(block, 1) for cache, _ in plan.decoding],
        lengths=[cache.length for cache, _ in plan.decoding],
        rows=[row for _, row in plan.decoding],
        scale=scale,
        slopes=plan.slopes,
    )


@dataclass(frozen=True, slots=True)
class _Scores:
    """What is added to the scaled products of one lane: fp32, and None where there is nothing."""

    bias: torch.Tensor | None
    """``[heads, 1, length]``."""
    causal: torch.Tensor | None
    """``[rows, length]``."""
    scale: float

    def compute(
        self, query: torch.Tensor, keys: torch.Tensor, part: slice, scratch: Scratch
    ) -> torch.Tensor:
        """``[heads, rows, head_dim]`` by ``[heads, head_dim, length]``, those heads in ``part``."""
        shape, dtype = (len(query), query.shape[1], keys.shape[2]), query.dtype
        if self.bias is None and self.causal is None:
            return torch.bmm(query, keys).mul_(self.scale)
        if self.causal is None:
            assert self.bias is not None
            return torch.baddbmm(self.bias[part].to(dtype), query, keys, alpha=self.scale)
        scores = scratch.take("scores", shape, dtype)
        if self.bias is None:
            scores.copy_(self.causal)
        else:
            torch.add(self.bias[part], self.causal, out=scores)
        return scores.baddbmm_(query, keys, alpha=self.scale)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: _Scores,
    scratch: Scratch,
    output: torch.Tensor,
) -> None:
    """One lane: query ``[heads, rows, head_dim]`` on ``[heads, head_dim, length]``, all of them.

    Writes ``[heads, rows, head_dim]`` into ``output``.
    """
    heads, rows, head_dim = query.shape
    length = keys.shape[2]
    widened = keys.dtype != query.dtype
    head_bytes = 2 * length * (rows * (rows > 1) + head_dim * widened) * query.dtype.itemsize
    limit = _SCRATCH_BYTES if rows > 1 else _DECODE_SCRATCH_BYTES
    group = max(1, min(heads, limit // max(1, head_bytes)))
    for first in range(0, heads, group):
        part = slice(first, first + group)
        some_keys, some_values = keys[part], values[part]
        if widened:
            some_keys = scratch.take("keys", some_keys.shape, query.dtype).copy_(some_keys)
            some_values = scratch.take("values", some_values.shape, query.dtype).copy_(some_values)
        some = scores.compute(query[part], some_keys, part, scratch)
        if rows > 1:
            weights = torch.softmax(
                some, dim=-1, out=scratch.take("weights", some.shape, some.dtype)
            )
        else:
            weights = torch.softmax(some, dim=-1)
        if rows <= _FEW_ROWS and _weights_first(query.device):
            output[part] = torch.bmm(weights, some_values.transpose(1, 2))
        else:
            output[part] = torch.bmm(some_values, weights.transpose(1, 2)).transpose(1, 2)


@functools.cache
@torch.inference_mode()
def _weights_first(device: torch.device) -> bool:
    """Whether few rows of weights times values are faster in this order than in the other.

    The same sums, and which of the two the library has a good kernel for differs by processor: with
    AVX-512, MKL is 4 times as fast in this order; measured once per process.
    """
    if device.type != "cpu":
        return True
    weights, values = torch.rand((16, 1, 512)), torch.rand((16, 64, 512))
    this = least_seconds(lambda: torch.bmm(weights, values.transpose(1, 2)))
    other = least_seconds(lambda: torch.bmm(values, weights.transpose(1, 2)))
    return this < other
