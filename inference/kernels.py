"""The kernels that multiply rows by a weight matrix.

A kernel is a class: made from a matrix, called with rows. The ops behind most of them are undocumented
parts of torch (what Inductor emits, what quantised modules call): which work here, and which is the
fastest, is found by trying them (``kernel_choice.py``).

What was measured (4096 × 16384, 2 cores, memory at about 30 GB/s): with AVX2, ``F.linear`` in
float32 streams its weights at 21 GB/s for one row and at 4 for four; oneDNN's reordered weights at
22 and 18; fbgemm's float16 weights at 25–29 and 21, at half the bytes. With AVX-512, for 1, 8 and
16 rows, fbgemm's at 21, 15 and 8, our own at 27, 20 and 13; its 8-bit weights at 14, 10 and 6, our
own at 20, 10 and 5 (10^9 weights a second); 4-bit ones of bitsandbytes, of torch and our own at 3,
24 and 31 for one row, at 1, 3 and 5 for 16. ``scripts/bench`` measures anew.
"""

import warnings
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

import torch
from torch.nn import functional as F

from .native import native
from .packed import PackedMatrix
from .packing import Packer
from .quantizing import Int8Weights


class WeightFormat(StrEnum):
    """What a matrix is held in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    """8-bit integers with a scale per output feature."""
    NF4 = "nf4"
    """4 bits with a scale per 64 weights: NF4 where bitsandbytes is fast, else integers."""

    @property
    def quantized(self) -> bool:
        """Whether it takes less than 16 bits."""
        return self in (WeightFormat.INT8, WeightFormat.NF4)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of a format that is not quantised."""
        dtype: torch.dtype = getattr(torch, self.value)
        return dtype


class Kernel(Protocol):
    """A matrix ``[out, in]`` (and a bias ``[out]``), held so as to be multiplied fast."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """``[rows, in]`` to ``[rows, out]``, in the dtype of ``rows``."""


MakeKernel = Callable[[torch.Tensor, torch.Tensor | None], Kernel]
"""Takes ``[out, in]`` of any floating dtype on the device, and a bias of the hidden dtype."""


class Plain:
    """``F.linear`` on weights of one dtype; rows of another are converted there and back."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = None if bias is None else bias.to(weight.dtype)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Kernel``."""
        return F.linear(rows.to(self._weight.dtype), self._weight, self._bias).to(rows.dtype)


class Reordered:
    """oneDNN with the weights in the order that its kernels read them in (float32, bfloat16)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._dtype = weight.dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = None if bias is None else bias.to(weight.dtype)
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Kernel``."""
        rows_, weight = rows.to(self._dtype), self._weight
        result: torch.Tensor = self._linear(rows_, weight, self._bias, "none", [], "")
        return result.to(rows.dtype)


class NativeKernel:
    """Our own product (``native.py``): narrow weights, float32 rows and sums."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        library = native()
        if library is None:
            raise RuntimeError("our kernels cannot be had here")
        self._multiply = library.multiply
        self.packed = self._pack(library.packer, weight)
        self._bias = None
        if bias is not None:
            self._bias = torch.zeros(self.packed.padded)
            self._bias[: len(bias)] = bias

    @property
    def biased(self) -> bool:
        """Whether it adds a bias."""
        return self._bias is not None

    @staticmethod
    def _pack(packer: Packer, weight: torch.Tensor) -> PackedMatrix:
        raise NotImplementedError

    def __call__(
        self,
        rows: torch.Tensor,
        *,
        gelu: bool = False,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``; see ``Native.multiply`` for what can be done on the way."""
        return self._multiply(rows, self.packed, self._bias, gelu=gelu, residual=residual, out=out)


class NativeFloat(NativeKernel):
    """Of weights of 32 bits: for one row a fifth to a third faster than oneDNN, for hundreds slower."""

    @staticmethod
    def _pack(packer: Packer, weight: torch.Tensor) -> PackedMatrix:
        return packer.pack(weight)


class NativeHalf(NativeKernel):
    """Of 16-bit weights of either kind.

    Those that 16 bits hold exactly give what float32 weights give, but for the order of the sums.
    """

    @staticmethod
    def _pack(packer: Packer, weight: torch.Tensor) -> PackedMatrix:
        return packer.pack(weight)


class NativeTwelve(NativeKernel):
    """Of bfloat16 in 12 bits, which give what 16 bits give, but for the order of the sums.

    Not tried against the others: out of memory, it is as much faster as it is smaller; out of a cache,
    where trials are, it is slower. Raises ValueError for matrices that are not without loss in 12 bits.
    """

    @staticmethod
    def _pack(packer: Packer, weight: torch.Tensor) -> PackedMatrix:
        packed = packer.pack_twelve(weight)
        if packed is None:
            raise ValueError(f"{tuple(weight.shape)} of {weight.dtype} would lose something")
        return packed


class NativeInt8(NativeKernel):
    """Of 8-bit weights, a scale per output feature."""

    @staticmethod
    def _pack(packer: Packer, weight: torch.Tensor) -> PackedMatrix:
        return packer.pack_int8(packer.nearest_int8(weight))


class NativeNf4(NativeKernel):
    """Of NF4, a scale per 64 weights."""

    @staticmethod
    def _pack(packer: Packer, weight: torch.Tensor) -> PackedMatrix:
        return packer.pack_nf4(packer.nearest_nf4(weight))


class FbgemmHalf:
    """fbgemm with float16 weights and float32 rows: weights are widened as they are read.

    All arithmetic is float32, so weights that float16 holds exactly give what float32 weights give,
    but for the order of the sums.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
        self._linear = torch.ops.quantized.linear_dynamic_fp16.default

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Kernel``."""
        result: torch.Tensor = self._linear(rows, self._packed)
        return result


class FbgemmInt8:
    """fbgemm with 8-bit weights (a scale per output feature) and rows of twice 7 bits.

    fbgemm multiplies 8-bit integers and would round the rows, all with one scale, to 7 bits: 2 %
    of error, and rows of different sessions in one another's scale. Here every row is scaled by
    itself and split into a high and a low part, which go through the product as two rows: the
    error that is left is the weights' own (0.8 %), the sums are exact integers, and a row's result
    does not depend on the rows beside it. 7 bits, because the AVX2 kernel adds pairs of products in
    16 bits.
    """

    _STEPS = 63
    """A part is from -63 to 63: 7 bits around the zero point."""
    _ZERO_POINT = 64

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        rounded = Int8Weights.nearest(weight)
        zero_points = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch will drop these tensors some day; then this kernel is found not to work.
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(
                rounded.integers, rounded.scales, zero_points, 0
            )
        self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias = bias
        name = "linear_with_input_q_dq_qweight_dq_output_fp32"
        self._linear = getattr(torch.ops.quantized, name).default

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Kernel``."""
        count = rows.shape[0]
        scales = rows.abs().amax(dim=1, keepdim=True) / self._STEPS
        scales.clamp_(min=torch.finfo(torch.float32).tiny)
        scaled = rows / scales
        parts = torch.empty((2 * count, rows.shape[1]))
        high, low = parts[:count], parts[count:]
        torch.round(scaled, out=high)
        torch.sub(scaled, high, out=low).mul_(2 * self._STEPS)
        products: torch.Tensor = self._linear(parts, 1.0, self._ZERO_POINT, self._packed)
        result = products[:count].add_(products[count:], alpha=0.5 / self._STEPS).mul_(scales)
        return result if self._bias is None else result.add_(self._bias)


class WeightOnlyInt8:
    """8-bit weights (a scale per output feature) that are widened as they are read."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        rounded = Int8Weights.nearest(weight)
        self._integers = rounded.integers
        self._scales = rounded.scales.bfloat16()
        self._bias = bias
        self._linear = torch.ops.aten._weight_int8pack_mm.default

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Kernel``."""
        result: torch.Tensor = self._linear(rows.bfloat16(), self._integers, self._scales)
        result = result.to(rows.dtype)
        return result if self._bias is None else result.add_(self._bias)


class PackedInt4:
    """4-bit integers, a scale and a zero point per 64 weights, widened as they are read."""

    _GROUP = 64

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        out_features, in_features = weight.shape
        if in_features % self._GROUP or out_features % 16:
            raise ValueError(f"{tuple(weight.shape)} does not divide into groups")
        groups = weight.float().view(out_features, -1, self._GROUP)
        low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
        scales = ((high - low) / 15).clamp_(min=torch.finfo(torch.float32).tiny)
        integers = ((groups - low) / scales).round_().clamp_(0, 15).to(torch.int32)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            integers.view(out_features, in_features), 1
        )
        # The kernel's zero is at 8: weight = (integer - 8) * scale + middle.
        parameters = torch.cat([scales, low + 8 * scales], dim=2)
        self._parameters = parameters.transpose(0, 1).contiguous().bfloat16()
        self._bias = bias
        self._linear = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Kernel``."""
        result: torch.Tensor = self._linear(
            rows.bfloat16(), self._packed, self._GROUP, self._parameters
        )
        result = result.to(rows.dtype)
        return result if self._bias is None else result.add_(self._bias)


class BitsandbytesNf4:
    """bitsandbytes' NF4: 4 bits on the quantiles of a normal distribution, a scale per 64."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        import bitsandbytes
        from bitsandbytes import functional

        self._matmul = bitsandbytes.matmul_4bit
        half = weight if weight.dtype in (torch.bfloat16, torch.float16) else weight.bfloat16()
        self._dtype = half.dtype
        self._packed, self._state = functional.quantize_4bit(
            half.contiguous(), blocksize=64, quant_type="nf4"
        )
        self._bias = bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Kernel``."""
        result: torch.Tensor = self._matmul(
            rows.to(self._dtype), self._packed.t(), quant_state=self._state
        )
        result = result.to(rows.dtype)
        return result if self._bias is None else result.add_(self._bias)


class BitsandbytesInt8:
    """bitsandbytes' LLM.int8(): 8-bit rows and weights, outlier columns in 16 bits."""

    _THRESHOLD = 6.0
    """Columns of rows with a larger value are outliers; the figure of the LLM.int8() paper."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        from bitsandbytes import nn

        out_features, in_features = weight.shape
        self._linear = nn.Linear8bitLt(
            in_features,
            out_features,
            bias=bias is not None,
            has_fp16_weights=False,
            threshold=self._THRESHOLD,
            device="meta",
        )
        self._linear.weight = nn.Int8Params(
            weight.half().cpu(), has_fp16_weights=False, requires_grad=False
        ).to(weight.device)
        if bias is not None:
            self._linear.bias = torch.nn.Parameter(bias, requires_grad=False)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``Kernel``."""
        result: torch.Tensor = self._linear(rows)
        return result
