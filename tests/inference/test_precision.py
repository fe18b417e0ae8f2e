"""What --dtype and --quantization mean."""

import pytest
import torch
from petals.inference import precision
from petals.inference.kernels import WeightFormat
from petals.inference.precision import Precision, resolve_precision
from petals.protocol.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FAST_HALF = {WeightFormat.FLOAT16: 1.0, WeightFormat.BFLOAT16: 2.0}


def resolve(
    dtype: str, device: torch.device, stored: torch.dtype | None, quantization: str = "none"
) -> tuple[str, torch.dtype, torch.dtype]:
    found = resolve_precision(dtype, quantization, device, stored)
    assert isinstance(found, Precision)
    return found.name, found.hidden, found.cache


def test_a_cpu_computes_in_float32_whatever_the_weights_are() -> None:
    assert resolve("float32", CPU, None) == ("float32", torch.float32, torch.float32)
    assert resolve("float16", CPU, None) == ("float16", torch.float32, torch.float16)
    assert resolve("bfloat16", CPU, None) == ("bfloat16", torch.float32, torch.bfloat16)
    assert resolve("float32", CPU, None, "int8") == ("int8", torch.float32, torch.float32)
    assert resolve("float16", CPU, None, "nf4") == ("nf4", torch.float32, torch.float16)


def test_auto_on_a_cpu_does_not_round_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "probe_seconds", lambda weights, _: FAST_HALF[weights])
    monkeypatch.setattr(precision, "widens", lambda *_: True)
    for stored in (torch.float32, torch.float16, torch.bfloat16, None):
        assert resolve("auto", CPU, stored)[0] == "float32"
    monkeypatch.setattr(precision, "widens", lambda *_: False)
    for stored in (torch.float32, torch.float16, None):
        assert resolve("auto", CPU, stored)[0] == "float32"
    assert resolve("auto", CPU, torch.bfloat16) == ("float16", torch.float32, torch.float16)
    assert resolve("auto", CPU, torch.float32, "int8") == ("int8", torch.float32, torch.float16)
    monkeypatch.setattr(precision, "probe_seconds", lambda weights, _: -FAST_HALF[weights])
    assert resolve("auto", CPU, torch.bfloat16) == ("bfloat16", torch.float32, torch.bfloat16)


def test_auto_on_cuda_is_16_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    half, brain = torch.float16, torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve("auto", CUDA, torch.float16) == ("float16", half, half)
    assert resolve("auto", CUDA, torch.float32) == ("bfloat16", brain, brain)
    assert resolve("auto", CUDA, torch.float32, "nf4") == ("nf4", brain, brain)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert resolve("auto", CUDA, torch.bfloat16) == ("float16", half, half)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="dtype: 'int3' is not one of auto, float32"):
        resolve("int3", CPU, None)
    with pytest.raises(ConfigError, match="quantization: 'int3' is not one of none, int8, nf4"):
        resolve("auto", CPU, None, "int3")
