"""What our own attention reads: rows that decode, and what their lanes have cached."""

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]

_Views = ctypes.c_int64 * 9
"""``struct strided`` three times."""


class DecodingRows:
    """A batch's new queries, keys and values: where they lie; they are kept alive meanwhile."""

    __slots__ = ("_kept", "cache_heads", "views")

    def __init__(
        self, views: ctypes.Array[ctypes.c_int64], cache_heads: int, kept: Sequence[torch.Tensor]
    ) -> None:
        """See ``separate`` and ``fused``."""
        self.views = views
        self.cache_heads = cache_heads
        self._kept = kept

    @classmethod
    def separate(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> "DecodingRows":
        """``query`` ``[1, heads, rows, head_dim]``, the others ``[1, cache_heads, rows, head_dim]``."""
        kept = [x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value)]
        views = _Views(*[n for x in kept for n in (x.data_ptr(), x.stride(1), x.stride(2))])
        return cls(views, key.shape[1], kept)

    @classmethod
    def fused(cls, fused: torch.Tensor, heads: int) -> "DecodingRows":
        """Contiguous float32 ``[1, rows, heads * 3 * head_dim]``, of each head query, key, value.

        So BLOOM has them; to make tensors of them takes as long as the rest.
        """
        begin, row = fused.data_ptr(), fused.shape[2]
        head = row // heads
        part = head // 3 * fused.itemsize
        views = _Views(begin, head, row, begin + part, head, row, begin + 2 * part, head, row)
        return cls(views, heads, (fused,))


def lane_memory(keys: torch.Tensor, values: torch.Tensor, key_norms: torch.Tensor) -> list[int]:
    """A row of ``CachedLanes``' memory: keys and values are ``[cache_heads, capacity, head_dim]``.

    ``key_norms`` are the greatest norms of keys, as ``LaneCache.key_norms``; they are kept up.
    """
    return [keys.data_ptr(), values.data_ptr(), key_norms.data_ptr(), keys.shape[1]]


class CachedLanes:
    """What lanes have cached in some blocks, in the order that ``Native.decode_attention`` reads it in.

    Made before a round begins: between two products, what Python does is time in which all threads wait.
    """

    def __init__(
        self,
        memory: Sequence[IntArray],
        lengths: Sequence[int],
        rows: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        """Lane i has ``lengths[i]`` tokens and owns row ``rows[i]`` of the batch.

        ``memory[i]`` is int64 ``[blocks, 4]``, of each block a ``lane_memory``, which whoever calls
        keeps alive; all keys and values are of one ``dtype``.
        """
        self.count = len(memory)
        self.dtype = dtype
        self._table = np.empty((len(memory[0]), self.count, 6), np.int64)  # of struct lane
        for lane, own in enumerate(memory):
            self._table[:, lane, :4] = own
        self._table[:, :, 4] = lengths
        self._table[:, :, 5] = rows
        self._address: int = self._table.ctypes.data
        self._room: list[int] = self._table[:, :, 3].min(axis=0).tolist()

    def set_lengths(self, lengths: Sequence[int]) -> bool:
        """Let the lanes have ``lengths`` tokens; False: there is no room behind as many."""
        if any(length >= room for length, room in zip(lengths, self._room, strict=True)):
            return False
        self._table[:, :, 4] = lengths
        return True

    def address(self, block: int) -> int:
        """Of ``struct lane``, ``count`` times, for a block, counted from the first one."""
        return self._address + block * self._table.strides[0]
