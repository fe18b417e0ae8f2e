"""Ragged attention: rows of many sessions in one batch, each row on its own session's KV cache.

A batch is ``[1, rows, hidden]``: the rows of several lanes behind one another, so that everything
but attention runs on all of them at once. Attention is a loop over the lanes, each with
``scaled_dot_product_attention`` on its own contiguous keys and values; measured faster than
padding, jagged tensors or paged KV. Within a lane it is causal.

ALiBi biases are fp32 and relative to the newest token (softmax doesn't see the shift), because
absolute ones round away in 16 bits. 16-bit attention is computed in fp32, group of heads by group
of heads: the reference for exactness is transformers in fp32, and on CPUs the upcast is faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .cache import LaneCache

_SCRATCH_BYTES = 32 * 2**20
"""About how much a group of heads may take in masks and upcast keys and values. Small enough to
stay near the processor, large enough that few groups are needed."""


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


@dataclass(frozen=True, slots=True)
class LaneRows:
    """``rows`` consecutive rows of a batch that belong to one lane, behind what it has cached."""

    cache: LaneCache
    rows: int


class Plan:
    """Whose rows are whose in one ragged batch; shared by all blocks that the batch runs through.

    Valid for one run: the masks are made from the lanes' lengths at its beginning.
    """

    def __init__(self, lanes: Sequence[LaneRows], bias: AlibiBias | None) -> None:
        self.lanes = tuple(lanes)
        self.rows = sum(lane.rows for lane in self.lanes)
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

    ``query``, ``key``, ``value`` are ``[1, heads, rows, head_dim]`` in the dtype of the model.
    Returns ``[1, rows, heads * head_dim]`` in the same dtype.
    """
    _, heads, rows, head_dim = query.shape
    output = query.new_empty((1, rows, heads, head_dim))
    start = 0
    for lane, bias, causal in zip(plan.lanes, plan.biases, plan.causal, strict=True):
        end = start + lane.rows
        keys, values = lane.cache.append(block, key[0, :, start:end], value[0, :, start:end])
        attended = _attend(query[0, :, start:end], keys, values, bias, causal, scale)
        output[0, start:end] = attended.transpose(0, 1)
        start = end
    return output.view(1, rows, heads * head_dim)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    causal: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """One lane: query ``[heads, rows, head_dim]`` on keys and values ``[heads, length, head_dim]``.

    Returns ``[heads, rows, head_dim]``.
    """
    heads = query.shape[0]
    group = _heads_at_once(query, keys)
    outputs = []
    for first in range(0, heads, group):
        part = slice(first, first + group)
        mask = causal
        if bias is not None:
            mask = bias[None, part] if causal is None else bias[None, part] + causal
        attended = F.scaled_dot_product_attention(
            query[None, part].float(),
            keys[None, part].float(),
            values[None, part].float(),
            attn_mask=mask,
            scale=scale,
        )
        outputs.append(attended[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _heads_at_once(query: torch.Tensor, keys: torch.Tensor) -> int:
    heads, rows, head_dim = query.shape
    length = keys.shape[1]
    mask = rows * length * 4 if rows > 1 else 0
    upcast = 2 * length * head_dim * 4 if keys.dtype != torch.float32 else 0
    return max(1, min(heads, _SCRATCH_BYTES // max(1, mask + upcast)))
