"""The kernels that multiply rows by a weight matrix, and the choice between them.

A kernel is a class: made from a matrix, called with rows. Which of them is the fastest depends on
the processor, so those that can hold a format are tried once per process, on a small matrix: one
that is missing, fails, or gives wrong figures is out, and of the others the first is taken, unless
a later one is clearly faster. The ops behind most of them are undocumented parts of torch (what
Inductor emits, what quantised modules call); that is why they are tried before they are trusted.

What was measured (4096 × 16384, 2 cores, memory at about 30 GB/s): with AVX2, ``F.linear`` in
float32 streams its weights at 21 GB/s for one row and at 4 for four; oneDNN's reordered weights at
22 and 18; fbgemm's float16 weights at 25–29 and 21, at half the bytes. With AVX-512, for 1, 8 and
16 rows, fbgemm's at 21, 15 and 8, our own at 27, 20 and 13; its 8-bit weights at 14, 10 and 6, our
own at 20, 10 and 5 (10^9 weights a second); 4-bit ones of bitsandbytes, of torch and our own at 3,
24 and 31 for one row, at 1, 3 and 5 for 16. ``scripts/bench`` measures anew.
"""

import functools
import math
import time
import warnings
from collections.abc import Callable
from enum import StrEnum
from typing import NoReturn, Protocol

import platformdirs
import torch
from torch.nn import functional as F

from ..protocol.errors import ConfigError
from .measured import circumstances, read, write
from .native import native
from .packed import PackedMatrix
from .packing import Packer
from .quantizing import Int8Weights

_ROWS = (1, 16)
"""A kernel is judged by one decoding session and by many."""
_PROBE_FEATURES = 1024
_TURNS = 5
_CLEARLY_FASTER = 0.75
"""Of the time of another kernel; less is noise, on a machine that others use too."""
_TOLERANCE = {"int8": 0.05, "nf4": 0.25}
"""Relative error that a kernel may have on random weights; 0.02 for formats not named here."""


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


_KERNELS: dict[tuple[str, WeightFormat], tuple[MakeKernel, ...]] = {
    ("cpu", WeightFormat.FLOAT32): (NativeFloat, Reordered),
    ("cpu", WeightFormat.FLOAT16): (NativeHalf, FbgemmHalf),
    ("cpu", WeightFormat.BFLOAT16): (NativeHalf, Reordered),
    ("cpu", WeightFormat.INT8): (NativeInt8, FbgemmInt8, WeightOnlyInt8),
    ("cpu", WeightFormat.NF4): (NativeNf4, BitsandbytesNf4, PackedInt4),
    ("cuda", WeightFormat.INT8): (BitsandbytesInt8,),
    ("cuda", WeightFormat.NF4): (BitsandbytesNf4,),
}
"""What may be faster than ``Plain``, or is needed because ``Plain`` cannot hold the format; the
better one first, by what it costs in error and in memory."""


_WIDENING: tuple[MakeKernel, ...] = (NativeHalf, FbgemmHalf)
"""Those that widen 16-bit weights as they read them, and compute in float32."""


Times = dict[MakeKernel, dict[int, float]]
"""Seconds by the count of rows."""


def widens(weights: WeightFormat, device: torch.device) -> bool:
    """Whether 16-bit ``weights`` may cost nothing but the bits that they lack: sums are float32."""
    return _fastest(weights, device, exact=True) is not None


def bytes_per_weight(weights: WeightFormat, device: torch.device, *, exact: bool = False) -> float:
    """Memory that a weight takes, scales and what a kernel adds included, as measured."""
    library = native() if weights is WeightFormat.BFLOAT16 and device.type == "cpu" else None
    twelve = library is not None and library.packer.has_twelve_bits
    if twelve and choose_kernel(weights, device, exact=exact) is NativeHalf:
        return 1.51
    return {"float32": 4.0, "int8": 1.2, "nf4": 0.57}.get(weights.value, 2.0)


def choose_kernel(
    weights: WeightFormat, device: torch.device, *, exact: bool = False
) -> MakeKernel:
    """The fastest kernel for ``weights`` that works on ``device``; measured once per process.

    With ``exact``, of those that round nothing of what 16-bit weights are multiplied by. Raises
    ConfigError when there is none, which only that or a quantised format can come to.
    """
    kernel, _ = _fastest(weights, device, exact=exact) or _none(weights, device)
    return kernel


def probe_seconds(weights: WeightFormat, device: torch.device) -> float:
    """What the chosen kernel takes on a small matrix: the geometric mean of one row and many."""
    _, seconds = _fastest(weights, device, exact=False) or _none(weights, device)
    return seconds


def _none(weights: WeightFormat, device: torch.device) -> NoReturn:
    raise ConfigError(
        f"quantization: nothing here can compute with {weights} weights on {device}; "
        "use another one, or none"
    )


@functools.cache
@torch.inference_mode()
def _fastest(
    weights: WeightFormat, device: torch.device, *, exact: bool
) -> tuple[MakeKernel, float] | None:
    candidates = _KERNELS.get((device.type, weights), ())
    if exact:
        candidates = tuple(kernel for kernel in candidates if kernel in _WIDENING)
    elif not weights.quantized:
        candidates += (Plain,)
    working: dict[MakeKernel, Callable[[int], float]] = {}
    for candidate in candidates:
        measure = _try(candidate, weights, device)
        if measure is not None:
            working[candidate] = measure
    if not working:
        return None
    # Taking turns, so that a moment in which somebody else computes hits all alike.
    taken = {kernel: dict.fromkeys(_ROWS, math.inf) for kernel in working}
    for _ in range(_TURNS):
        for kernel, measure in working.items():
            for count in _ROWS:
                taken[kernel][count] = min(taken[kernel][count], measure(count))
    best: tuple[MakeKernel, float] | None = None
    for kernel, by_count in _least_ever(taken, weights, device).items():
        seconds = math.pow(math.prod(by_count.values()), 1 / len(_ROWS))
        if best is None or seconds < _CLEARLY_FASTER * best[1]:
            best = kernel, seconds
    return best


def _least_ever(taken: Times, weights: WeightFormat, device: torch.device) -> Times:
    """What kernels took, or less if another process has ever found so; kept for the next one.

    Others that compute, or load, make a kernel that uses all cores look far slower than one of one core.
    """
    path = platformdirs.user_cache_path("petals-node") / "kernels.json"
    key, known = circumstances(weights, device=device), read(path)
    before = {
        name: seconds
        for name, seconds in known.pop(key, {}).items()
        if isinstance(seconds, float) and seconds > 0  # whatever the file says
    }
    least = {
        kernel: {
            count: min(seconds, before.get(f"{_name(kernel)}, {count}", math.inf))
            for count, seconds in by_count.items()
        }
        for kernel, by_count in taken.items()
    }
    flat = {f"{_name(kernel)}, {n}": s for kernel, times in least.items() for n, s in times.items()}
    write(path, known | {key: before | flat})
    return least


def _name(kernel: MakeKernel) -> str:
    return getattr(kernel, "__name__", repr(kernel))


def _try(
    kernel: MakeKernel, weights: WeightFormat, device: torch.device
) -> Callable[[int], float] | None:
    """What measures the seconds of ``kernel`` for a count of rows; None if it does not work here."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((2 * _PROBE_FEATURES, _PROBE_FEATURES), generator=generator).to(device)
    hidden = torch.float32 if device.type == "cpu" or weights.quantized else weights.torch_dtype
    if device.type == "cuda" and weights.quantized:
        hidden = torch.float16
    held = weight.to(hidden if weights.quantized else weights.torch_dtype)
    inputs = {
        count: torch.randn((count, _PROBE_FEATURES), generator=generator).to(device, hidden)
        for count in _ROWS
    }
    try:
        made = kernel(held, None)
        for rows in inputs.values():
            expected = F.linear(rows.float(), weight)
            error = (made(rows).float() - expected).norm() / expected.norm()
            if not error < _TOLERANCE.get(weights, 0.02):
                return None
    # An op that this build of torch lacks, or has for other processors only, raises anything.
    except Exception:  # noqa: BLE001
        return None
    return lambda count: least_seconds(functools.partial(made, inputs[count]), device)


def least_seconds(action: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds that ``action`` takes: the least of a few, which noise only makes longer."""
    least = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        action()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - begin)
    return least
