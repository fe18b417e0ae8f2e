"""Device, dtype, memory and speed of this machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from petals.inference import device, memory
from petals.inference.checkpoint import Checkpoint, open_checkpoint
from petals.inference.device import resolve_device, resolve_dtype
from petals.inference.linear import Linear, swap_linears
from petals.inference.throughput import measure
from petals.protocol.errors import ConfigError
from petals.protocol.span import Span
from support.tiny_bloom import save_bloom

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save_bloom(tmp_path))


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, count: int, *, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)


def test_devices_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, 0)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            resolve_device(name)


@pytest.mark.parametrize(
    "name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda:²", "mps"]
)
def test_no_devices(name: str) -> None:
    with pytest.raises(ConfigError, match="use auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_devices_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="this machine has cuda:0 to cuda:1"):
        resolve_device("cuda:2")


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert resolve_dtype("auto", CPU, torch.bfloat16) == torch.float32
    assert resolve_dtype("bfloat16", CPU, None) == torch.bfloat16
    pretend_cuda(monkeypatch, 1)
    assert resolve_dtype("auto", cuda, torch.float16) == torch.float16
    assert resolve_dtype("auto", cuda, torch.float32) == torch.bfloat16
    pretend_cuda(monkeypatch, 1, bf16=False)
    assert resolve_dtype("auto", cuda, torch.bfloat16) == torch.float16
    with pytest.raises(ConfigError, match="'int3' is not one of auto, float32"):
        resolve_dtype("int3", CPU, None)
    assert set(device.DTYPES) == {"float32", "bfloat16", "float16"}


def test_blocks_that_fit(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    token = 2 * 48 * 4
    parameters = 12 * 48 * 48 + 13 * 48  # matrices; biases and norms
    assert checkpoint.block_parameters() == parameters
    block = parameters * 4 + 8192 * token
    for free, expected in ((0, 0), (block, 0), (1.3 * block, 1), (3.8 * block, 3), (99 * block, 5)):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: int(free))
        assert memory.blocks_that_fit(checkpoint, torch.float32, CPU) == expected
    monkeypatch.setattr(memory, "free_memory", lambda _: 2**40)
    assert memory.default_cache_tokens(checkpoint, 5, torch.float32, CPU) == 65_536
    monkeypatch.setattr(memory, "free_memory", lambda _: 0)
    assert memory.default_cache_tokens(checkpoint, 5, torch.float32, CPU) == 2048


def test_free_memory_respects_a_containers_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    without = memory.free_memory(CPU)
    assert without > 2**20
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert memory.free_memory(CPU) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(CPU) > 2**20


def test_throughput(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petals.inference.throughput._SECONDS", 0.001)
    throughput = measure(checkpoint.load_blocks(Span(1, 3)))
    assert throughput.decode > 0
    assert throughput.prefill > 0


def test_swapped_linears_keep_their_parameters_and_results() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(3, 4))
    module = torch.nn.Sequential(inner, torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    before, names = module(x), list(module.state_dict())
    swap_linears(module)
    assert isinstance(module[1], Linear) and isinstance(inner[0], Linear)
    assert list(module.state_dict()) == names
    assert torch.equal(module(x), before)


def test_sampling_parameters_cost_no_torch() -> None:
    code = "import petals.inference.sampling_params, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
