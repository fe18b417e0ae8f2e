"""Ragged attention: rows of many sessions in one batch, each row on its own session's KV cache.

A batch is ``[1, rows, hidden]``: the rows of several lanes behind one another, so that everything
but attention runs on all of them at once. Attention is a loop over the lanes, each on its own
contiguous keys and values; measured faster than padding, jagged tensors or paged KV. Within a lane
it is causal. It is two matrix products with a softmax between them: on the CPU measured, they take a
half to nine tenths of what ``scaled_dot_product_attention`` with a mask takes.

A head of keys may serve a group of query heads. A sliding window leaves keys out, a soft cap bends
scores; both go with the block and not with the plan, since models have them in some blocks only.

ALiBi biases are fp32 and relative to the newest token (softmax doesn't see the shift), because
absolute ones round away in 16 bits. On a CPU, attention is computed in fp32, and a 16-bit cache is
widened group of heads by group of heads, into memory that is used again and again: faster than
16-bit arithmetic there, and as exact as the cache is. All lanes that decode go into one call of
``native.py`` where that can be had: in the loop, half of their time is the calls' own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .cache import LaneCache
from .lanes import CachedLanes, DecodingRows
from .native import native

_SCRATCH_BYTES = 32 * 2**20
"""About how much a group of heads may take in masks, keys and values. Small enough to stay near the
processor, large enough that few groups are needed."""
_DECODE_SCRATCH_BYTES = 4 * 2**20
"""The same for a single row, which reads each of them only once: what a cache level holds."""


class Bias(Protocol):
    """What is added to every score, whatever the block."""

    @property
    def slopes(self) -> torch.Tensor | None:
        """fp32 ``[heads]`` if the bias is the distance to the newest token times these."""

    def last(self, length: int) -> torch.Tensor:
        """fp32 ``[heads, 1, length]``: what the newest of ``length`` tokens adds to each score."""


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


class _Lane:
    """What the blocks need to know of a lane that goes through the loop."""

    def __init__(self, lane: LaneRows, first: int, bias: Bias | None) -> None:
        self.cache = lane.cache
        self.rows = lane.rows
        self.first = first
        """The first of its rows in the batch."""
        self._bias = bias
        self._seen: dict[int | None, _Seen] = {}

    def seen(self, window: int | None) -> "_Seen":
        """What its rows see through a window, made once for all blocks that have such a one."""
        if window not in self._seen:
            before, total = self.cache.length, self.cache.length + self.rows
            first = 0 if window is None else max(0, before - window + 1)
            bias = None if self._bias is None else self._bias.last(total)[:, :, first:]
            mask = None
            if self.rows > 1:
                mask = torch.full((self.rows, total - first), -torch.inf, device=self.cache.device)
                left = None if window is None else mask.tril(before - first - window)
                mask.triu_(before - first + 1)
                mask = mask if left is None else mask.add_(left)
            self._seen[window] = _Seen(first, bias, mask)
        return self._seen[window]


@dataclass(frozen=True, slots=True)
class _Seen:
    """The keys that some rows of a lane see, and how."""

    first: int
    """Keys before this one are seen by none of the rows."""
    bias: torch.Tensor | None
    """fp32 ``[heads, 1, keys]``."""
    mask: torch.Tensor | None
    """fp32 ``[rows, keys]`` of 0 and -inf, or None for a single row."""


class Plan:
    """Whose rows are whose in one ragged batch; shared by all blocks that the batch runs through.

    Valid for one run: the masks are made from the lanes' lengths at its beginning.
    """

    def __init__(self, lanes: Sequence[LaneRows], bias: Bias | None, scratch: Scratch) -> None:
        self.lanes = tuple(lanes)
        self.rows = sum(lane.rows for lane in self.lanes)
        self.scratch = scratch
        self.slopes = None if bias is None else bias.slopes
        """fp32 ``[heads]`` of ALiBi."""
        self._decoding: list[tuple[LaneCache, int]] = []
        """Lanes that go together, each with its row."""
        self.decoding: CachedLanes | None = None
        """What those rows have cached in the blocks that were prepared; None if there are none."""
        self._first_block = 0
        self.looped: list[_Lane] = []
        """Lanes that go one by one."""
        together = bias is None or bias.slopes is not None
        first = 0
        for lane in self.lanes:
            on_cpu = lane.cache.device.type == "cpu"
            if together and lane.rows == 1 and on_cpu and native() is not None:
                self._decoding.append((lane.cache, first))
            else:
                self.looped.append(_Lane(lane, first, bias))
            first += lane.rows

    def prepare(self, blocks: range) -> None:
        """Make room in the caches of ``blocks`` for the rows that decode, all at once.

        What the last round of the same lanes has found of their memory is used again while it holds.
        """
        if not self._decoding:
            return
        self._first_block = blocks.start
        first, _ = self._decoding[0]
        lengths = [cache.length for cache, _ in self._decoding]
        rows = [row for _, row in self._decoding]
        if first.together is not None:
            holds, self.decoding = first.together
            layouts = [cache.layout for cache, _ in self._decoding]
            if holds == (blocks, rows, layouts) and self.decoding.set_lengths(lengths):
                return
        memory = [cache.memory(blocks, 1) for cache, _ in self._decoding]
        self.decoding = CachedLanes(memory, lengths, rows, first.dtype)
        layouts = [cache.layout for cache, _ in self._decoding]  # now that there is room
        first.together = (blocks, rows, layouts), self.decoding

    def prepared(self, block: int) -> int:
        """The place of ``block`` among those that were prepared."""
        return block - self._first_block

    def positions(self, device: torch.device) -> torch.Tensor:
        """int64 ``[1, rows]``: where in its lane each row is."""
        positions = [
            position
            for lane in self.lanes
            for position in range(lane.cache.length, lane.cache.length + lane.rows)
        ]
        return torch.tensor([positions], device=device)


def ragged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    plan: Plan,
    block: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attend each lane's rows to its cache, after writing their keys and values into it.

    ``query`` is ``[1, heads, rows, head_dim]``, ``key`` and ``value`` are ``[1, cache_heads, rows,
    head_dim]`` in the dtype of the hidden states. A row sees itself and what is before it: of that
    only the last ``window`` tokens, itself among them, if there is one. ``softcap`` bends scores
    into -softcap to softcap. Returns ``[1, rows, heads * head_dim]`` in the same dtype.
    """
    _, heads, rows, head_dim = query.shape
    output = query.new_empty((rows, heads, head_dim))
    if plan.decoding is not None:
        library = native()
        assert library is not None
        library.decode_attention(
            DecodingRows.separate(query, key, value),
            output,
            plan.decoding,
            plan.prepared(block),
            scale=scale,
            slopes=plan.slopes,
            window=window,
            softcap=softcap,
        )
    for lane in plan.looped:
        part = slice(lane.first, lane.first + lane.rows)
        keys, values = lane.cache.append(block, key[0, :, part], value[0, :, part])
        seen = lane.seen(window)
        _attend(
            query[0, :, part],
            keys[:, seen.first :],
            values[:, seen.first :],
            _Scores(seen.bias, seen.mask, scale, softcap),
            plan.scratch,
            output[part].transpose(0, 1),
        )
    return output.view(1, rows, heads * head_dim)


def fused_attention(
    fused: torch.Tensor, *, heads: int, plan: Plan, block: int, scale: float
) -> torch.Tensor | None:
    """``ragged_attention`` of ``[1, rows, heads * 3 * head_dim]``: of each head query, key, value.

    None if rows of the plan do not decode, or not together.
    """
    library = native()
    if plan.decoding is None or plan.looped or library is None or not fused.is_contiguous():
        return None
    _, rows, width = fused.shape
    output = fused.new_empty((rows, heads, width // (3 * heads)))
    library.decode_attention(
        DecodingRows.fused(fused, heads),
        output,
        plan.decoding,
        plan.prepared(block),
        scale=scale,
        slopes=plan.slopes,
    )
    return output.view(1, rows, width // 3)


@dataclass(frozen=True, slots=True)
class _Scores:
    """How the products of one lane become scores; None where there is nothing."""

    bias: torch.Tensor | None
    """fp32 ``[heads, 1, length]``."""
    mask: torch.Tensor | None
    """fp32 ``[rows, length]``."""
    scale: float
    softcap: float | None

    def compute(
        self, query: torch.Tensor, keys: torch.Tensor, heads: slice, scratch: Scratch
    ) -> torch.Tensor:
        """``[n, group * rows, length]`` of query ``[n, group * rows, head_dim]`` and as many keys.

        ``keys`` are ``[n, length, head_dim]``; ``heads`` are those of the query, of all.
        """
        count, grouped, length, dtype = len(query), query.shape[1], keys.shape[1], query.dtype
        keys = keys.transpose(1, 2)
        added = self._added(heads, scratch, (count, grouped, length), dtype)
        if self.softcap is not None:
            scores = torch.bmm(query, keys).mul_(self.scale / self.softcap).tanh_()
            scores.mul_(self.softcap)
            return scores if added is None else scores.add_(added)
        if added is None:
            return torch.bmm(query, keys).mul_(self.scale)
        if self.mask is None:
            return torch.baddbmm(added, query, keys, alpha=self.scale)
        return added.baddbmm_(query, keys, alpha=self.scale)

    def _added(
        self, heads: slice, scratch: Scratch, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Bias and mask, of ``shape``; in scratch memory if there is a mask."""
        if self.mask is None:
            return None if self.bias is None else self.bias[heads].to(dtype).view(shape)
        count, grouped, length = shape
        rows = len(self.mask)
        added = scratch.take("scores", shape, dtype)
        by_head = added.view(count * (grouped // rows), rows, length)
        if self.bias is None:
            by_head.copy_(self.mask)
        else:
            torch.add(self.bias[heads], self.mask, out=by_head)
        return added


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: _Scores,
    scratch: Scratch,
    output: torch.Tensor,
) -> None:
    """One lane: query ``[heads, rows, head_dim]`` on ``[cache_heads, length, head_dim]``.

    Writes ``[heads, rows, head_dim]`` into ``output``. The query heads that share a head of keys
    are further rows of it.
    """
    heads, rows, head_dim = query.shape
    cache_heads, length, _ = keys.shape
    group = heads // cache_heads
    grouped = group * rows
    query = query.reshape(cache_heads, grouped, head_dim)
    widened = keys.dtype != query.dtype
    head_bytes = 2 * length * (grouped * (rows > 1) + head_dim * widened) * query.dtype.itemsize
    limit = _SCRATCH_BYTES if rows > 1 else _DECODE_SCRATCH_BYTES
    step = max(1, min(cache_heads, limit // max(1, head_bytes)))
    for first in range(0, cache_heads, step):
        part = slice(first, first + step)
        of_query = slice(first * group, (first + step) * group)
        some_keys, some_values = keys[part], values[part]
        if widened:
            some_keys = scratch.take("keys", some_keys.shape, query.dtype).copy_(some_keys)
            some_values = scratch.take("values", some_values.shape, query.dtype).copy_(some_values)
        some = scores.compute(query[part], some_keys, of_query, scratch)
        if rows > 1:
            weights = torch.softmax(
                some, dim=-1, out=scratch.take("weights", some.shape, some.dtype)
            )
        else:
            weights = torch.softmax(some, dim=-1)
        output[of_query] = torch.bmm(weights, some_values).view(-1, rows, head_dim)
