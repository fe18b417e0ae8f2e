"""A head that reads most of its weights in 8 bits where only its largest output is wanted.

Reading the head is most of what a token costs its originator, and greedy decoding wants no more of
it than the place of the largest output. An output from weights that were rounded to 8 bits is off by
no more than the norm of what the rounding took from its weights times the norm of the row (Cauchy
and Schwarz), and by the rounding of the sums, which is bounded, too (Higham, "Accuracy and Stability
of Numerical Algorithms", section 3.1). Whatever may be the largest by that is computed from the
weights themselves, by the kernel that computes all of them otherwise: the same bits, at about half
of the time of weights in 16 bits, for half as much memory again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .device import free_memory
from .kernels import NativeFloat, NativeHalf, NativeTwelve
from .linear import Linear
from .native import Native, native
from .packed import PackedMatrix, described, mapped_zeros, unpacked

_LEAST_WEIGHTS = 1 << 20
"""Below, what is saved is not worth the bookkeeping."""
_MEMORY = 0.25
"""Of what is free at most, for the weights in 8 bits."""
_MOST_ROWS = 4
"""Beyond, products with 8-bit weights wait for arithmetic and are no faster."""
_LATEST = 8
"""Products that a mean is taken of, about."""
_PAUSE = 256
"""Products for which nothing is screened when that has been in vain."""
_ROUNDED_AT_ONCE = 1 << 24
"""Weights; while they are rounded, they take some 200 MB."""
_UNIT = 2.0**-24
"""float32's unit of rounding."""


class ScreenedLinear(nn.Module):
    """Computes what ``whole`` computes; within ``largest_only``, of a few rows, less than that."""

    def __init__(self, whole: Linear, library: Native) -> None:
        """``whole`` is of our own kernels in 12 to 32 bits, without a bias, of full panels but the last."""
        super().__init__()
        self._whole = whole
        self._library = library
        self._parts = _packed(whole)
        self._described = described(self._parts)
        self._features = sum(part.features for part in self._parts)
        self._rounded, self._errors = _round(self._parts)
        self._largest_only = False
        held = sum(part.data.nbytes for part in self._parts)
        self._most_chosen = 1 - self._rounded.data.nbytes / held
        """Of all panels: if more have to be computed all the same, screening costs more than it saves."""
        self._chosen = 0.0
        """Of all panels, lately."""
        self._pause = 0

    @contextmanager
    def largest_only(self) -> Iterator[None]:
        """Within, an output that is not the largest of its row may be wrong, and is smaller."""
        self._largest_only = True
        try:
            yield
        finally:
            self._largest_only = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 ``[..., in]`` to ``[..., out]``."""
        rows = x.reshape(-1, x.shape[-1])
        if self._largest_only and len(rows) <= _MOST_ROWS:
            if self._pause:
                self._pause -= 1
            elif (screened := self._screened(rows)) is not None:
                return screened.view(*x.shape[:-1], -1)
        output: torch.Tensor = self._whole(x)
        return output

    def _screened(self, rows: torch.Tensor) -> torch.Tensor | None:
        """``[rows, out]``; None if it is unknown which may be the largest, as where there is NaN."""
        rows = rows.contiguous()
        outputs = self._library.multiply(rows, self._rounded, None)
        highest = self._library.find_highest(rows, outputs, self._errors)
        if highest is None:
            return None
        # What is largest there in truth excludes most of what may be larger elsewhere.
        best, compute = sorted(set(highest.best)), self._library.multiply_panels
        compute(rows, self._described, best, outputs)
        others = self._library.find_others(outputs, self._errors, highest)
        compute(rows, self._described, others, outputs)
        self._count((len(best) + len(others)) / len(self._rounded.data))
        return outputs[:, : self._features]

    def _count(self, chosen: float) -> None:
        """Where all outputs are much alike, as far as 8 bits can tell, pause."""
        self._chosen += (chosen - self._chosen) / _LATEST
        if self._chosen > self._most_chosen:
            self._pause, self._chosen = _PAUSE, 0.0


def screened(head: Linear) -> Linear | ScreenedLinear:
    """``head``, screened if that makes it faster and memory allows."""
    library, parts = native(), _packed(head)
    weights = sum(part.padded * part.inputs for part in parts)
    if library is None or not parts or weights < _LEAST_WEIGHTS:
        return head
    if weights > _MEMORY * free_memory(torch.device("cpu")):
        return head
    return ScreenedLinear(head, library)


def _packed(head: Linear) -> list[PackedMatrix]:
    """Its matrix, piece by piece; nothing if it is held in another way, or in several, or has a bias."""
    exact = NativeFloat | NativeHalf | NativeTwelve
    kernels = [each for each in head.kernels if isinstance(each, exact)]
    if len(kernels) < len(head.kernels) or any(kernel.biased for kernel in kernels):
        return []
    packed = [kernel.packed for kernel in kernels]
    alike = len({(part.data.dtype, part.exponents is None) for part in packed}) == 1
    return packed if alike else []


def _round(parts: Sequence[PackedMatrix]) -> tuple[PackedMatrix, torch.Tensor]:
    """All ``parts`` in 8 bits, and by how much an output may be off, for a row of norm 1.

    Both are of whole panels; outputs that only make up the last one are -inf off, and never chosen.
    """
    inputs, panel = parts[0].inputs, parts[0].panel
    panels = sum(len(part.data) for part in parts)
    integers = mapped_zeros((panels, inputs, panel), torch.int8)
    scales = torch.empty((panels, 1, panel))
    errors = torch.empty((panels, panel))
    first = 0
    for part in parts:
        step = max(1, _ROUNDED_AT_ONCE // (inputs * panel))
        for begin in range(0, len(part.data), step):
            weights = unpacked(part, begin, min(begin + step, len(part.data)))
            own = slice(first, first + len(weights))
            scale = (weights.abs().amax(dim=1, keepdim=True) / 127).clamp_(min=2.0**-120)
            rounded = (weights / scale).round_()
            integers[own], scales[own] = rounded, scale
            taken = rounded.mul_(scale).sub_(weights).norm(dim=1)
            summed = 4 * (inputs + 8) * _UNIT * (weights.norm(dim=1) + taken)
            errors[own] = 1.001 * (taken + summed)
            first += len(weights)
    features = panels * panel
    off = errors.view(-1)
    off[sum(part.features for part in parts) :] = -torch.inf
    return PackedMatrix(features, inputs, features, integers, scales, inputs), off
