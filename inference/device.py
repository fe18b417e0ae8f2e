"""Which device and which dtype to compute in, from what the user wrote.

``auto`` is a CUDA device where there is one; and float32 on a CPU (exact, and no slower there
without special kernels), the checkpoint's own 16-bit dtype on CUDA.
"""

import torch

from ..protocol.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What ``--dtype`` takes besides ``auto``."""


def resolve_device(device: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that exists here.

    Raises ConfigError for anything else, and for a CUDA device that this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device == "cpu":
        return torch.device("cpu")
    kind, _, number = device.partition(":")
    if kind != "cuda" or (":" in device and not (number.isascii() and number.isdigit())):
        raise ConfigError(
            f"device: {device!r} is not a device; use auto, cpu, cuda or cuda:N (such as cuda:0)"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device: {device!r} was asked for, but torch sees no CUDA device on this machine; "
            "use cpu, or install a torch build with CUDA and its driver"
        )
    index = int(number or "0")
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device: there is no {device!r}; this machine has cuda:0 to "
            f"cuda:{torch.cuda.device_count() - 1}"
        )
    return torch.device("cuda", index)


def resolve_dtype(
    dtype: str, device: torch.device, checkpoint_dtype: torch.dtype | None
) -> torch.dtype:
    """``auto`` or a name in ``DTYPES`` as a dtype that ``device`` computes well in.

    ``checkpoint_dtype`` is what the checkpoint's config says that its weights are stored in.
    Raises ConfigError for an unknown name.
    """
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ConfigError(f"dtype: {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if device.type == "cpu":
        return torch.float32
    if checkpoint_dtype == torch.float16 or not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16
