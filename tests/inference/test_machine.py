"""Device, memory and speed of this machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from petals.inference import device, memory, throughput
from petals.inference.checkpoint import Checkpoint, open_checkpoint
from petals.inference.device import resolve_device
from petals.inference.kernel_choice import widens
from petals.inference.kernels import WeightFormat
from petals.inference.native import native
from petals.protocol.errors import ConfigError
from petals.protocol.span import Span
from support.tiny_bloom import save_bloom, tiny_bloom

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


def test_blocks_that_fit(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    token = 2 * 48 * 4
    parameters = 12 * 48 * 48 + 13 * 48  # matrices; biases and norms
    assert checkpoint.block_parameters() == parameters
    exact = checkpoint.precision("float32", CPU)
    block = parameters * 4 + 8192 * token
    for free, expected in ((0, 0), (block, 0), (1.3 * block, 1), (3.8 * block, 3), (99 * block, 5)):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: int(free))
        assert memory.blocks_that_fit(checkpoint, exact, CPU) == expected
    monkeypatch.setattr(memory, "free_memory", lambda _: 2**40)
    assert memory.default_cache_tokens(checkpoint, 5, exact, CPU) == 65_536
    monkeypatch.setattr(memory, "free_memory", lambda _: 0)
    assert memory.default_cache_tokens(checkpoint, 5, exact, CPU) == 2048


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_narrow_weights_take_less_memory(tmp_path: Path, stored: str) -> None:
    model = tiny_bloom().to(getattr(torch, stored))
    stored_in_16_bits = open_checkpoint(save_bloom(tmp_path, model))

    def bytes_per_weight(dtype: str, quantization: str = "none") -> float:
        precision = stored_in_16_bits.precision(dtype, CPU, quantization)
        return stored_in_16_bits.block_bytes(precision, CPU) / stored_in_16_bits.block_parameters()

    library = native()
    brain = 1.51 if library is not None and library.packer.has_twelve_bits else 2
    half = {"float16": 2, "bfloat16": brain}[stored]
    exact = half if widens(WeightFormat(stored), CPU) else 4  # held without loss
    assert bytes_per_weight("float32") == pytest.approx(exact, rel=1e-3)
    assert bytes_per_weight("float16") == 2
    assert bytes_per_weight("bfloat16") == pytest.approx(brain, rel=1e-3)
    eight = 1.2 if library is None else 1.01
    assert bytes_per_weight("auto", "int8") == pytest.approx(eight, rel=1e-3)
    assert 0.5 < bytes_per_weight("auto", "nf4") < 0.6


def test_free_memory_respects_a_containers_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    without = device.free_memory(CPU)
    assert without > 2**20
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert device.free_memory(CPU) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert device.free_memory(CPU) > 2**20


def test_throughput_is_measured_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(throughput, "_SECONDS", 0.001)
    blocks = checkpoint.load_blocks(Span(1, 3))
    folder = tmp_path / "data"

    def speeds(precision: str = "float32") -> throughput.Throughput:
        return throughput.remembered(blocks, model="a", precision=precision, folder=folder)

    first = speeds()
    assert min(first.decode, first.decode_8, first.decode_32, first.prefill) > 0
    assert speeds() == first
    assert speeds("float16") != first
    for damage in ("", "[]", '{"x": 1}', '{"x": {"decode": 1}}'):
        (folder / "throughput.json").write_text(damage)
        assert speeds().decode > 0
    (folder / "throughput.json").unlink()
    (folder / "throughput.json").mkdir()
    assert speeds().decode > 0, "what cannot be remembered is measured"


def test_sampling_parameters_cost_no_torch() -> None:
    code = "import petals.inference.sampling_params, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
