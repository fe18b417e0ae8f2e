"""Tensors as they travel: bytes with a meaning, and the names of what the meaning can be.

Bytes are little-endian and row-major (C order). A **row** is what the last dimension counts; rows
lie behind one another without gaps, so that a log can cut a tensor between any two of them. Nothing
here knows torch; ``inference/tensors.py`` turns these into torch tensors and back.

In a frame's header a tensor is described by ``[dtype, shape, compression]``. Plain element types
have the compression ``none``; ``int8`` travels as ``absmax64``: a row of ``w`` values is
``ceil(w / 64)`` float32 scales, one for each 64 values (the last one maybe for fewer), and then
``w`` int8 values. A value is its int8 times its scale, and a scale is the greatest magnitude among
its values over 127, as in Petals' blockwise 8-bit compression (arXiv 2209.01188, section 3.1, which
takes it from Dettmers et al., arXiv 2110.02861).
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from .errors import RemoteProtocolError

MAX_DIMENSIONS = 4
"""Hidden states have three dimensions; one more is headroom, more is an attack."""
BLOCK_VALUES = 64
"""Values of a row that share a scale in int8."""
SCALE_BYTES = 4
"""A scale is a float32."""


def scales_of(width: int) -> int:
    """How many scales a row of ``width`` values has in int8."""
    return -(-width // BLOCK_VALUES)


class DType(StrEnum):
    """Element types on the wire, by torch's names."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"
    """With a scale for every 64 values: about 0.7 % error at a little over 1 byte a value."""

    @property
    def compression(self) -> str:
        """What the header calls the way in which the elements are packed."""
        return "absmax64" if self is DType.INT8 else "none"

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of ``width`` values."""
        if self is DType.INT8:
            return SCALE_BYTES * scales_of(width) + width
        return width * (4 if self is DType.FLOAT32 else 2)


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor's bytes with dtype and shape. ``data`` may be a view into a received frame."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes | memoryview

    def __post_init__(self) -> None:
        expected = _bytes_of(self.dtype, self.shape)
        if len(self.data) != expected:
            raise RemoteProtocolError(
                f"a {self.dtype} tensor of shape {self.shape} takes {expected} bytes, "
                f"got {len(self.data)}"
            )


@lru_cache(maxsize=256)
def _bytes_of(dtype: DType, shape: tuple[int, ...]) -> int:
    """What a tensor takes. Raises RemoteProtocolError for a shape that none has."""
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise RemoteProtocolError(
            f"a tensor has 1 to {MAX_DIMENSIONS} dimensions, got shape {shape}"
        )
    if any(size < 1 for size in shape):
        raise RemoteProtocolError(f"a tensor has no empty dimension, got shape {shape}")
    return math.prod(shape[:-1]) * dtype.row_bytes(shape[-1])
