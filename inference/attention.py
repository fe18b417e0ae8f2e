"""Ragged attention: rows of many sessions in one batch, each row on its own session's KV cache.

A batch is ``[1, rows, hidden]``: the rows of several lanes behind one another, so that everything
but attention runs on all of them at once. Attention is a loop over the lanes, each on its own
contiguous keys and values; measured faster than padding, jagged tensors or paged KV. Within a lane
it is causal. A single row, as in decoding, is two matrix products along the cached tokens, which
reads them at close to memory speed; several rows go through ``scaled_dot_product_attention``.

ALiBi biases are fp32 and relative to the newest token (softmax doesn't see the shift), because
absolute ones round away in 16 bits. On a CPU, attention is computed in fp32, and a 16-bit cache is
widened group of heads by group of heads, into memory that is used again and again: faster than
16-bit arithmetic there, and as exact as the cache is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .cache import LaneCache

_SCRATCH_BYTES = 32 * 2**20
"""About how much a group of heads may take in masks, keys and values. Small enough to stay near the
processor, large enough that few groups are needed."""
_DECODE_SCRATCH_BYTES = 4 * 2**20
"""The same for a single row, which reads each of them only once: what a cache level holds."""


class AlibiBias:
    """The ALiBi bias by distance, for all lanes and blocks: a slice of one growing table."""

    def __init__(self, slopes: torch.Tensor) -> None:
        """``slopes``: fp32 ``[heads]``."""
        self._slopes = slopes
        self._table = slopes.new_zeros((slopes.shape[0], 1, 0))

    def last(self, length: int) -> torch.Tensor:
        """fp32 ``[heads, 1, length]``: what the newest of ``length`` tokens adds to each score."""
        capacity = self._table.shape[2]
        if length > capacity:
            capacity = max(length, 2 * capacity, 256)
            distance = torch.arange(1 - capacity, 1, device=self._slopes.device)
            self._table = self._slopes[:, None, None] * distance
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


class Plan:
    """Whose rows are whose in one ragged batch; shared by all blocks that the batch runs through.

    Valid for one run: the masks are made from the lanes' lengths at its beginning.
    """

    def __init__(self, lanes: Sequence[LaneRows], bias: AlibiBias | None, scratch: Scratch) -> None:
        self.lanes = tuple(lanes)
        self.rows = sum(lane.rows for lane in self.lanes)
        self.scratch = scratch
        self.biases = tuple(
            None if bias is None else bias.last(lane.cache.length + lane.rows)
            for lane in self.lanes
        )
        """Per lane fp32 ``[heads, 1, length]``, or None without ALiBi."""
        self.causal = tuple(_causal_mask(lane) for lane in self.lanes)
        """Per lane fp32 ``[rows, length]`` of 0 and -inf, or None for a single row."""


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
    start = 0
    for lane, bias, causal in zip(plan.lanes, plan.biases, plan.causal, strict=True):
        end = start + lane.rows
        keys, values = lane.cache.append(
            block, new_keys[:, :, start:end], new_values[:, :, start:end]
        )
        if causal is None:
            _attend_row(
                queries[:, start:end], keys, values, bias, scale, plan.scratch, output[start]
            )
        else:
            _attend_rows(
                queries[:, start:end], keys, values, bias, causal, scale, plan.scratch,
                output[start:end].transpose(0, 1),
            )  # fmt: skip
        start = end
    return output.view(1, rows, heads * head_dim)


def _attend_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    scratch: Scratch,
    output: torch.Tensor,
) -> None:
    """One row: query ``[heads, 1, head_dim]`` on ``[heads, head_dim, length]``, all of them.

    Writes ``[heads, head_dim]`` into ``output``.
    """
    heads = query.shape[0]
    group = heads
    widened = keys.dtype != query.dtype
    if widened:
        head_bytes = 2 * keys.shape[1] * keys.shape[2] * query.dtype.itemsize
        group = _heads_at_once(heads, head_bytes, _DECODE_SCRATCH_BYTES)
    for first in range(0, heads, group):
        part = slice(first, first + group)
        some_keys, some_values = keys[part], values[part]
        if widened:
            some_keys = scratch.take("keys", some_keys.shape, query.dtype).copy_(some_keys)
            some_values = scratch.take("values", some_values.shape, query.dtype).copy_(some_values)
        if bias is None:
            scores = torch.bmm(query[part], some_keys).mul_(scale)
        else:
            scores = torch.baddbmm(bias[part].to(query.dtype), query[part], some_keys, alpha=scale)
        weights = torch.softmax(scores, dim=-1)
        output[part] = torch.bmm(some_values, weights.transpose(1, 2))[:, :, 0]


def _attend_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    causal: torch.Tensor,
    scale: float,
    scratch: Scratch,
    output: torch.Tensor,
) -> None:
    """Some rows of one lane: query ``[heads, rows, head_dim]`` on ``[heads, head_dim, length]``.

    Writes ``[heads, rows, head_dim]`` into ``output``.
    """
    heads, rows, _ = query.shape
    _, head_dim, length = keys.shape
    head_bytes = length * query.dtype.itemsize * (2 * head_dim + rows)
    group = _heads_at_once(heads, head_bytes, _SCRATCH_BYTES)
    for first in range(0, heads, group):
        part = slice(first, first + group)
        shape = (len(keys[part]), length, head_dim)
        some_keys = scratch.take("keys", shape, query.dtype).copy_(keys[part].transpose(1, 2))
        some_values = scratch.take("values", shape, query.dtype).copy_(values[part].transpose(1, 2))
        mask = causal
        if bias is not None:
            mask = scratch.take("mask", (shape[0], rows, length), torch.float32)
            torch.add(bias[part], causal, out=mask)
        attended = F.scaled_dot_product_attention(
            query[None, part],
            some_keys[None],
            some_values[None],
            attn_mask=mask[None].to(query.dtype),
            scale=scale,
        )
        output[part] = attended[0]


def _heads_at_once(heads: int, head_bytes: int, limit: int) -> int:
    return max(1, min(heads, limit // max(1, head_bytes)))
