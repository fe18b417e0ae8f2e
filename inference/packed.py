"""Matrices as our own product reads them: in panels of neighbouring output features.

``native_product.c`` says what lies where.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

NATIVE_DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int8: 3,
    torch.uint8: 4,
}
"""``enum dtype``; NF4 are unsigned bytes here."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What our code reads; other floating dtypes become float32 first."""
_TWELVE_BITS, _INT8_PAIRS = 5, 6
"""``TWELVE`` and ``INT8_PAIRS``."""
_LARGE = 1 << 22
"""Bytes of a matrix that no cache holds for long: only there does it matter how memory is read."""

_void, _size, _int = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int


class _Matrix(ctypes.Structure):
    """``struct matrix``."""

    _fields_ = (
        ("data", _void),
        ("scales", _void),
        ("group", _size),
        ("features", _size),
        ("inputs", _size),
        ("dtype", _int),
        ("exponents", _void),
        ("firsts", _void),
        ("places", _void),
        ("others", _void),
    )


@dataclass(frozen=True)
class Exponents:
    """What a matrix of 12 bits (``twelve_bits.py``) has besides its data."""

    frequent: torch.Tensor
    """``[panels, 16]``, uint8: what codes stand for."""
    firsts: torch.Tensor
    """``[panels + 1]``, int64: where the others of each panel begin, and where the last ones end."""
    places: torch.Tensor
    """``[others]``, int32: in its panel, ascending."""
    others: torch.Tensor
    """``[others]``, float32: the weights that have other exponents."""


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix ``[out, in]``, packed for ``Native.multiply``."""

    features: int
    inputs: int
    padded: int
    """Output features, made up to whole panels; those beyond ``features`` give no sense."""
    data: torch.Tensor
    """``[panels, inputs, …]``."""
    scales: torch.Tensor | None = None
    """``[panels, groups, panel]``, float32."""
    group: int = 0
    """Inputs that share a scale; 0 without scales."""
    exponents: Exponents | None = None
    """Of 12 bits."""
    pairs: bool = False
    """Of 8 bits: whether two inputs of a feature lie behind one another."""

    @property
    def panel(self) -> int:
        """Output features of a panel."""
        return self.padded // len(self.data)

    @functools.cached_property
    def large(self) -> bool:
        """Whether it matters how it is read."""
        return self.data.nbytes >= _LARGE

    @functools.cached_property
    def described(self) -> object:
        """Where it is and what: a ``struct matrix``, made once."""
        return ctypes.byref(self.structure)

    @functools.cached_property
    def structure(self) -> _Matrix:
        """That itself."""
        own, dtype = self.exponents, NATIVE_DTYPES[self.data.dtype]
        if own is not None:
            dtype = _TWELVE_BITS
        elif self.pairs:
            dtype = _INT8_PAIRS
        parts = (own.frequent, own.firsts, own.places, own.others) if own else ()
        return _Matrix(
            self.data.data_ptr(),
            None if self.scales is None else self.scales.data_ptr(),
            self.group,
            self.padded,
            self.inputs,
            dtype,
            *[part.data_ptr() for part in parts],
        )


def described(parts: Sequence[PackedMatrix]) -> object:
    """Where several are, which whoever calls keeps alive: an array of ``struct matrix``."""
    return (_Matrix * len(parts))(*[part.structure for part in parts])


def unpacked(matrix: PackedMatrix, first: int, last: int) -> torch.Tensor:
    """What panels ``first`` to ``last - 1`` of a matrix without scales hold, float32 ``[panels, in, panel]``."""
    data, own, panel = matrix.data[first:last], matrix.exponents, matrix.panel
    if own is None:
        return _in_order(data.float()) if data.dtype == torch.bfloat16 else data.float()
    # As from_twelve of native_vectors.h does it.
    halves = data[:, :, panel:]
    codes = torch.cat([halves & 15, halves >> 4], dim=2).view(len(data), -1)
    frequent = own.frequent[first:last].gather(1, codes.long()).view(len(data), -1, panel)
    fractions = data[:, :, :panel].int()
    words = (fractions & 0x80) << 8 | (fractions & 0x7F) | frequent.int() << 7
    weights = _in_order((words << 16).view(torch.float32))
    firsts = own.firsts[first : last + 1].tolist()
    for number, (begin, stop) in enumerate(itertools.pairwise(firsts)):
        weights[number].view(-1)[own.places[begin:stop].long()] = own.others[begin:stop]
    return weights


def _in_order(weights: torch.Tensor) -> torch.Tensor:
    """bfloat16 neighbours in a panel ``[panels, in, panel]`` are half a panel apart."""
    panels, inputs, panel = weights.shape
    return weights.view(panels, inputs, panel // 2, 2).transpose(2, 3).reshape(weights.shape)


def mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory of their own, in huge pages where there are any.

    In malloc's heap, what stays would lie between the pieces that come and go while it is packed,
    and they would never go back to the system: a large block would take twice its size.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
