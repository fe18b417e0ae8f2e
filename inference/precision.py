"""What to hold weights in, and what to compute in, from what the user wrote.

On a CPU, hidden states are float32 whatever the weights are: its kernels for 16-bit and quantised
weights take float32 rows and accumulate in float32, so narrower weights save memory and bandwidth
and hidden states lose nothing. On CUDA, hidden states are of the weights' dtype.

``auto`` is what the machine is fastest in without rounding the checkpoint's weights: on a CPU,
float32 for a checkpoint in float32 or in 16 bits that a kernel widens as it reads them (which are
held as such, without loss: ``linear.py``), else the faster 16-bit kernel; on CUDA 16 bit.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch

from ..protocol.errors import ConfigError
from .kernel_choice import probe_seconds, widens
from .kernels import WeightFormat

DTYPES = tuple(name.value for name in WeightFormat if not name.quantized)
"""What ``--dtype`` takes besides ``auto``."""


class Quantization(StrEnum):
    """What ``--quantization`` takes."""

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"


@dataclass(frozen=True, slots=True)
class Precision:
    """How blocks, or the ends, are held and computed."""

    weights: WeightFormat
    """Of the matrices; layer norms and biases are of ``hidden``."""
    hidden: torch.dtype
    """Of the hidden states that go in and come out."""
    cache: torch.dtype
    """Of the KV cache."""

    @property
    def name(self) -> str:
        """What announcements say."""
        return str(self.weights)


def resolve_precision(
    dtype: torch.dtype | str,
    quantization: str,
    device: torch.device,
    stored: torch.dtype | None,
) -> Precision:
    """The precision that ``--dtype`` and ``--quantization`` mean on ``device``.

    ``stored`` is the dtype of the checkpoint's weights, if its config says. Raises ConfigError for
    unknown names.
    """
    if quantization not in list(Quantization):
        raise ConfigError(f"quantization: {quantization!r} is not one of {', '.join(Quantization)}")
    name = str(dtype).removeprefix("torch.")
    if name not in ("auto", *DTYPES):
        raise ConfigError(f"dtype: {name!r} is not one of auto, {', '.join(DTYPES)}")
    if name != "auto":
        weights = WeightFormat(name)
    elif device.type == "cpu":
        weights = _fastest_on_cpu(device, stored, quantized=quantization != Quantization.NONE)
    else:
        half = stored == torch.float16 or not torch.cuda.is_bf16_supported()
        weights = WeightFormat.FLOAT16 if half else WeightFormat.BFLOAT16
    computed = weights.torch_dtype
    if quantization != Quantization.NONE:
        weights = WeightFormat(quantization)
    return Precision(
        weights=weights,
        hidden=torch.float32 if device.type == "cpu" else computed,
        cache=computed,
    )


def _fastest_on_cpu(
    device: torch.device, stored: torch.dtype | None, *, quantized: bool
) -> WeightFormat:
    if not quantized and (stored != torch.bfloat16 or widens(WeightFormat.BFLOAT16, device)):
        return WeightFormat.FLOAT32
    halves = (WeightFormat.FLOAT16, WeightFormat.BFLOAT16)
    return min(halves, key=lambda weights: probe_seconds(weights, device))
