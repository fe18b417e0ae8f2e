"""Tensors as they travel: bytes with a meaning, and the names of what the meaning can be.

Bytes are little-endian and row-major (C order). Nothing here knows torch; ``inference/tensors.py``
turns these into torch tensors and back.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from .errors import RemoteProtocolError

MAX_DIMENSIONS = 4
"""Hidden states have three dimensions; one more is headroom, more is an attack."""


class DType(StrEnum):
    """Element types on the wire, by torch's names."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def size(self) -> int:
        """Bytes per element."""
        return 4 if self is DType.FLOAT32 else 2


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor's bytes with dtype and shape. ``data`` may be a view into a received frame."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes | memoryview

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= MAX_DIMENSIONS:
            raise RemoteProtocolError(
                f"a tensor has 1 to {MAX_DIMENSIONS} dimensions, got shape {self.shape}"
            )
        if any(size < 1 for size in self.shape):
            raise RemoteProtocolError(f"a tensor has no empty dimension, got shape {self.shape}")
        expected = math.prod(self.shape) * self.dtype.size
        if len(self.data) != expected:
            raise RemoteProtocolError(
                f"a {self.dtype} tensor of shape {self.shape} takes {expected} bytes, "
                f"got {len(self.data)}"
            )
