"""Into what our own product multiplies by: rounding weights, and laying them in panels."""

import ctypes
import dataclasses

import torch
from torch.nn import functional as F

from .packed import FLOATS, NATIVE_DTYPES, PackedMatrix, mapped_zeros
from .quantizing import NF4_GROUP, Int8Weights, Nf4Weights, nf4_between
from .twelve_bits import TwelveBits

_void, _size, _int = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int


class Packer:
    """The compiled functions for it. Matrices are ``[out, in]``, on the CPU."""

    def __init__(self, library: ctypes.CDLL, panel: int) -> None:
        """``panel`` is how many output features a panel has."""
        self.panel = panel
        self._twelve_bits = TwelveBits(library, panel)
        self.has_pairs = bool(library.has_pairs())
        """Whether this processor multiplies bfloat16, two inputs at once. Then rows are rounded to that
        for weights of 8 and 4 bits, and so are NF4's levels."""
        self._lay_panels = library.lay_panels
        self._lay_panels.argtypes = [_void, _int, _size, _size, _void]
        self._lay_panels.restype = None
        self._lay_nibbles = library.lay_nibbles
        self._lay_nibbles.argtypes = [_void, _size, _size, _void]
        self._lay_nibbles.restype = None
        self._round_int8 = library.round_int8
        self._round_int8.argtypes = [_void, _int, _size, _size, _void, _void]
        self._round_int8.restype = None
        self._round_nf4 = library.round_nf4
        self._round_nf4.argtypes = [_void, _int, _size, _size, _void, _void, _void]
        self._round_nf4.restype = None

    @property
    def has_twelve_bits(self) -> bool:
        """Whether ``pack_twelve`` is possible with this processor."""
        return self._twelve_bits.available

    def pack(self, weight: torch.Tensor) -> PackedMatrix:
        """``[out, in]`` of 32 or 16 bits, in the order that ``multiply`` reads it in."""
        if weight.dtype not in FLOATS:
            raise TypeError(f"weights of {weight.dtype} cannot be packed")
        return self._in_panels(weight)

    def pack_twelve(self, weight: torch.Tensor) -> PackedMatrix | None:
        """The same of bfloat16, in 12 bits; None if that is not possible without loss."""
        if weight.dtype != torch.bfloat16 or not self._twelve_bits.available:
            return None
        return self._twelve_bits.pack(weight)

    def nearest_int8(self, weight: torch.Tensor) -> Int8Weights:
        """``Int8Weights.nearest``, in a quarter of the time."""
        weight = _readable(weight)
        integers = torch.empty(weight.shape, dtype=torch.int8)
        scales = torch.empty(len(weight))
        self._round_int8(
            weight.data_ptr(),
            NATIVE_DTYPES[weight.dtype],
            *weight.shape,
            integers.data_ptr(),
            scales.data_ptr(),
        )
        return Int8Weights(integers, scales)

    def nearest_nf4(self, weight: torch.Tensor) -> Nf4Weights:
        """The nearest of NF4's levels, for the greatest magnitude of each group as its scale."""
        weight, between = _readable(weight), nf4_between()
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        scales = torch.empty((len(weight), -(-weight.shape[1] // NF4_GROUP)))
        self._round_nf4(
            weight.data_ptr(),
            NATIVE_DTYPES[weight.dtype],
            *weight.shape,
            between.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
        )
        return Nf4Weights(codes, scales)

    def pack_int8(self, weights: Int8Weights) -> PackedMatrix:
        """The same of 8-bit integers."""
        integers, scales = weights.integers, weights.scales[:, None]
        inputs = integers.shape[1]
        if not self.has_pairs:
            return self._in_panels(integers, scales, group=inputs)
        words = F.pad(integers, (0, inputs % 2)).view(torch.float16)  # as something of that size
        packed = self._in_panels(words, scales, group=inputs)
        data = packed.data.view(torch.int8)
        return dataclasses.replace(packed, inputs=inputs, data=data, pairs=True)

    def pack_nf4(self, weights: Nf4Weights) -> PackedMatrix:
        """The same of 4-bit NF4: two of them in a byte."""
        return self._in_panels(weights.codes, weights.scales, group=weights.group)

    def _in_panels(
        self, weight: torch.Tensor, scales: torch.Tensor | None = None, *, group: int = 0
    ) -> PackedMatrix:
        """``weight``, and the ``scales`` ``[out, groups]`` of ``group`` inputs."""
        weight = weight.contiguous()
        (features, inputs), panel = weight.shape, self.panel
        panels = -(-features // panel)
        if weight.dtype == torch.uint8:  # of NF4, 8 inputs go into a word
            data = mapped_zeros((panels, -(-inputs // 8) * 8, panel // 2), weight.dtype)
            self._lay_nibbles(weight.data_ptr(), features, inputs, data.data_ptr())
        else:
            data = mapped_zeros((panels, inputs, panel), weight.dtype)
            begin, dtype = weight.data_ptr(), NATIVE_DTYPES[weight.dtype]
            self._lay_panels(begin, dtype, features, inputs, data.data_ptr())
        if scales is not None:
            padded = F.pad(scales, (0, 0, 0, panels * panel - features))
            scales = padded.view(panels, panel, -1).transpose(1, 2).contiguous()
        return PackedMatrix(features, inputs, panels * panel, data, scales, group)


def _readable(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` of any floating dtype, as our code reads it."""
    return (weight if weight.dtype in FLOATS else weight.float()).contiguous()
