"""Which kernel multiplies by weights of a format: the fastest that works on this machine.

Those that can hold a format are tried once per process, on a small matrix: one that is missing, fails,
or gives wrong figures is out, and of the others the first is taken, unless a later one is clearly
faster.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import NoReturn

import platformdirs
import torch
from torch.nn import functional as F

from ..protocol.errors import ConfigError
from .kernels import (
    BitsandbytesInt8,
    BitsandbytesNf4,
    FbgemmHalf,
    FbgemmInt8,
    MakeKernel,
    NativeFloat,
    NativeHalf,
    NativeInt8,
    NativeNf4,
    PackedInt4,
    Plain,
    Reordered,
    WeightFormat,
    WeightOnlyInt8,
)
from .measured import circumstances, read, write
from .native import native

_ROWS = (1, 16)
"""A kernel is judged by one decoding session and by many."""
_PROBE_FEATURES = 1024
_TURNS = 16
"""In which no kernel became faster, before they are believed: beside others that compute, one that uses
all cores finds them free now and then only."""
_FASTER = 0.97
_PATIENCE = 4.0
"""Seconds for all turns."""
_CLEARLY_FASTER = 0.75
"""Of the time of another kernel; less is noise, on a machine that others use too."""
_TOLERANCE = {"int8": 0.05, "nf4": 0.25}
"""Relative error that a kernel may have on random weights; 0.02 for formats not named here."""

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
    library = native() if device.type == "cpu" else None
    if library is not None and weights in (WeightFormat.BFLOAT16, WeightFormat.INT8):
        kernel = choose_kernel(weights, device, exact=exact)
        if kernel is NativeInt8:
            return 1.01
        if kernel is NativeHalf and library.packer.has_twelve_bits:
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
    begin, turns = time.monotonic(), 0
    while turns < _TURNS and time.monotonic() - begin < _PATIENCE:
        turns += 1
        for kernel, measure in working.items():
            for count in _ROWS:
                seconds, least = measure(count), taken[kernel][count]
                taken[kernel][count] = min(least, seconds)
                if seconds < _FASTER * least:
                    turns = 0
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
    return lambda count: _least_seconds(functools.partial(made, inputs[count]), device)


def _least_seconds(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``action`` takes: the least of a few, which noise only makes longer."""
    least = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - begin)
    return least
