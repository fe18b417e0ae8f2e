"""The one module that stands where transformers' layers have ``nn.Linear``.

It holds its matrix in pieces of output features, each in the kernel that ``kernel_choice.py`` chose for
the format: pieces bound the memory that packing takes beyond the result, and some kernels are
faster on them.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from .kernel_choice import choose_kernel, widens
from .kernels import Kernel, NativeHalf, NativeKernel, NativeTwelve, Plain, WeightFormat

PIECE = 1 << 25
"""Weights of a piece: while it is packed, it takes 128 MiB in float32."""
_FEATURES = 64
"""Pieces are of a multiple of this many output features, as 4-bit kernels want them."""


class Linear(nn.Module):
    """``x @ weight.T + bias`` with ``weight`` ``[out, in]``, on ``x`` ``[..., in]``."""

    def __init__(self, kernels: list[Kernel]) -> None:
        """``kernels`` are of consecutive output features."""
        super().__init__()
        self.kernels = tuple(kernels)
        native = [kernel for kernel in kernels if isinstance(kernel, NativeKernel)]
        self._native = native if len(native) == len(kernels) else []
        self._only = native[0] if len(native) == len(kernels) == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, in the dtype of ``x``."""
        return self._compute(x) if self._only is None else self._only(x)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """GELU's tanh approximation of ``forward``."""
        return self._compute(x, gelu=True) if self._only is None else self._only(x, gelu=True)

    def added_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``residual`` ``[..., out]`` and ``forward``."""
        if self._only is None:
            return self._compute(x, residual=residual)
        return self._only(x, residual=residual)

    def _compute(
        self, x: torch.Tensor, *, gelu: bool = False, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(len(rows), -1)
        if self._native:
            output = rows.new_empty((len(rows), sum(k.packed.features for k in self._native)))
            first = 0
            for kernel in self._native:
                own = slice(first, first + kernel.packed.features)
                part = None if added is None else added[:, own]
                kernel(rows, gelu=gelu, residual=part, out=output[:, own])
                first = own.stop
        else:
            outputs = [kernel(rows) for kernel in self.kernels]
            output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
            if gelu:
                output = F.gelu(output, approximate="tanh")
            if added is not None:
                output = added + output
        return output.view(*x.shape[:-1], output.shape[1])


Read = Callable[[int, int], torch.Tensor]
"""Rows ``start..stop-1`` of a matrix, ``[stop - start, in]`` of any floating dtype, on the CPU."""


def pack_linear(
    shape: torch.Size,
    read: Read,
    bias: torch.Tensor | None,
    weights: WeightFormat,
    device: torch.device,
) -> Linear:
    """Hold the matrix of ``shape`` ``[out, in]`` that ``read`` gives, piece by piece.

    In ``FLOAT32``, pieces that 16 bits hold exactly are held in 16 bits where a kernel computes
    with them in float32: the same figures at half the memory and bandwidth. Those of bfloat16 are
    held in 12 bits where a kernel of ours computes, if they lose nothing, as nearly all don't.
    """
    kernels: list[Kernel] = []
    for start, stop in _pieces(shape, device):
        piece = read(start, stop).to(device)
        part = None if bias is None else bias[start:stop].contiguous()
        kernels.append(_pack(piece, part, weights))
    return Linear(kernels)


def _pieces(shape: torch.Size, device: torch.device) -> Iterator[tuple[int, int]]:
    out_features, in_features = shape
    step = max(_FEATURES, PIECE // in_features // _FEATURES * _FEATURES)
    if device.type != "cpu":  # one launch is faster than several
        step = out_features
    for start in range(0, out_features, step):
        yield start, min(out_features, start + step)


def _pack(piece: torch.Tensor, bias: torch.Tensor | None, weights: WeightFormat) -> Kernel:
    half = _exact_half(piece) if weights is WeightFormat.FLOAT32 else None
    weights = half or weights
    make = choose_kernel(weights, piece.device, exact=half is not None)
    if weights.quantized:
        try:
            return make(piece, bias)
        except ValueError:  # it does not divide into groups
            return _pack(piece, bias, WeightFormat.FLOAT16)
    if make is NativeHalf and weights is WeightFormat.BFLOAT16:
        with contextlib.suppress(ValueError):  # it does not fit
            return NativeTwelve(piece.to(torch.bfloat16), bias)
    # What keeps the matrix as it is must not keep a view of the file.
    keeps = make is Plain and piece.device.type == "cpu"
    held = piece.to(weights.torch_dtype, copy=keeps, memory_format=torch.contiguous_format)
    return make(held, bias)


def _exact_half(piece: torch.Tensor) -> WeightFormat | None:
    """The 16-bit format that holds ``piece`` exactly and computes in float32, if there is one."""
    halves = [
        half for half in (WeightFormat.FLOAT16, WeightFormat.BFLOAT16) if widens(half, piece.device)
    ]
    for half in halves:  # nothing to try, and no memory to try it in
        if piece.dtype == half.torch_dtype:
            return half
    for half in halves:
        # Nearly every matrix that doesn't fit shows that in a row.
        if all(
            torch.equal(some.to(half.torch_dtype).to(piece.dtype), some)
            for some in (piece[:1], piece)
        ):
            return half
    return None
