"""bfloat16 weights in 12 bits, without loss.

Signs and fractions of weights are as good as noise, but of 256 exponents they have few: weights are
spread about normally, and only one in thousands is 2^12 times smaller than most. DFloat11 (Zhang
et al., "70% size, 100% accuracy", arXiv 2504.11651) gives exponents codes of as many bits as they
need; here, all have 4, which a processor's vectors decode as fast as memory is read. A panel has 15
exponents of its own choice, and 0, which zeros have; what has another one is kept beside it, and is 0
in its place. So every weight is what it was, at three quarters of the memory and of what is read.
"""

import ctypes

import torch

from .packed import Exponents, PackedMatrix, mapped_zeros

_CODES = 16
_MOST_OTHERS = 1 / 500
"""Of all weights. One costs what 50 that fit take, and 8 bytes."""

_void, _size = ctypes.c_void_p, ctypes.c_ssize_t


class TwelveBits:
    """Packs matrices; ``available`` says whether ``Native.multiply`` takes them here."""

    def __init__(self, library: ctypes.CDLL, panel: int) -> None:
        self.available = bool(library.has_twelve_bits())
        self._panel = panel
        self._find = library.find_exponents
        self._find.argtypes = [_void, _size, _size, _void, _void]
        self._find.restype = None
        self._pack = library.pack_twelve
        self._pack.argtypes = [_void, _size, _size, _void, _void, _void, _void, _void]
        self._pack.restype = None

    def pack(self, weight: torch.Tensor) -> PackedMatrix | None:
        """``[out, in]`` of bfloat16 on the CPU; None if too many of its exponents are rare."""
        weight = weight.contiguous()
        (features, inputs), panel = weight.shape, self._panel
        panels = -(-features // panel)
        frequent = torch.empty((panels, _CODES), dtype=torch.uint8)
        counts = torch.empty(panels, dtype=torch.int64)
        begin = weight.data_ptr()
        self._find(begin, features, inputs, frequent.data_ptr(), counts.data_ptr())
        firsts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        others = int(firsts[-1])
        if others > _MOST_OTHERS * weight.numel():
            return None
        exponents = Exponents(
            frequent, firsts, torch.empty(others, dtype=torch.int32), torch.empty(others)
        )
        data = mapped_zeros((panels, inputs, panel + panel // 2), torch.uint8)
        self._pack(
            begin,
            features,
            inputs,
            frequent.data_ptr(),
            firsts.data_ptr(),
            data.data_ptr(),
            exponents.places.data_ptr(),
            exponents.others.data_ptr(),
        )
        return PackedMatrix(features, inputs, panels * panel, data, exponents=exponents)
