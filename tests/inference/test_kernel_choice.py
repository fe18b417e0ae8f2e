"""Of the kernels for a format, the fastest that works here is taken; none that rounds, where that matters."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from petals.inference import kernel_choice, kernels
from petals.inference.kernel_choice import choose_kernel, probe_seconds, widens
from petals.inference.kernels import (
    FbgemmHalf,
    MakeKernel,
    NativeHalf,
    Plain,
    Reordered,
    WeightFormat,
)
from petals.protocol.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is known of any kernel; what is found goes into this file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel_choice._fastest.cache_clear()
    yield tmp_path / "petals-node" / "kernels.json"
    kernel_choice._fastest.cache_clear()


def try_by(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[MakeKernel], float]) -> None:
    """Kernels take so long, whatever they take."""
    monkeypatch.setattr(kernel_choice, "_try", lambda kernel, *_: lambda _: seconds(kernel))


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_a_kernel_is_found_for_every_format(weights: WeightFormat) -> None:
    assert choose_kernel(weights, CPU) is choose_kernel(weights, CPU), "it is measured once"
    assert probe_seconds(weights, CPU) > 0


@pytest.mark.usefixtures("untried")
def test_what_does_not_work_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            raise RuntimeError("no such op")

    class Wrong:
        def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            self.features = len(weight)

        def __call__(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(rows), self.features)

    choices = {("cpu", WeightFormat.FLOAT32): (Broken, Wrong), ("cpu", WeightFormat.NF4): (Broken,)}
    monkeypatch.setattr(kernel_choice, "_KERNELS", choices)
    assert choose_kernel(WeightFormat.FLOAT32, CPU) is Plain
    with pytest.raises(ConfigError, match="nothing here can compute with nf4"):
        choose_kernel(WeightFormat.NF4, CPU)


def test_the_least_that_any_process_found_decides(
    untried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others that compute, a kernel that uses all cores looks slow, and one of one core does not."""

    def chosen(**seconds: float) -> MakeKernel:
        kernel_choice._fastest.cache_clear()
        takes = {getattr(kernels, name): taken for name, taken in seconds.items()}
        try_by(monkeypatch, lambda kernel: takes.get(kernel, 1e3) + 1e-9)
        return choose_kernel(WeightFormat.FLOAT16, CPU)

    assert chosen(NativeHalf=5.0, FbgemmHalf=2.0) is FbgemmHalf
    assert chosen(NativeHalf=1.0, FbgemmHalf=1.5) is NativeHalf
    assert chosen(NativeHalf=9.0, FbgemmHalf=2.0) is NativeHalf
    for damage in ("{", "[]", '{"a": 1}', "null"):
        untried.write_text(damage)
        assert chosen(NativeHalf=9.0, FbgemmHalf=2.0) is FbgemmHalf
    known = json.loads(untried.read_text())
    nonsense: list[object] = ["0.1", None, -1.0, [], math.nan]
    for value in nonsense:
        untried.write_text(
            json.dumps({key: dict.fromkeys(own, value) for key, own in known.items()})
        )
        assert chosen(NativeHalf=1.0, FbgemmHalf=1.5) is NativeHalf
        assert chosen(NativeHalf=9.0, FbgemmHalf=2.0) is NativeHalf


@pytest.mark.usefixtures("untried")
def test_a_kernel_that_others_slow_down_for_a_while_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slowed = iter([9.0] * 20 + [1.0] * 999)
    try_by(monkeypatch, lambda kernel: next(slowed) if kernel is NativeHalf else 2.0)
    assert choose_kernel(WeightFormat.FLOAT16, CPU) is NativeHalf


@pytest.mark.usefixtures("untried")
def test_what_rounds_rows_is_not_taken_for_what_is_to_be_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However fast it is: checkpoints in bfloat16 give the text of float32 by default."""
    takes: dict[MakeKernel, float] = {NativeHalf: 9.0, Reordered: 1.0}
    try_by(monkeypatch, lambda kernel: takes.get(kernel, 99.0))
    assert choose_kernel(WeightFormat.BFLOAT16, CPU) is Reordered
    assert choose_kernel(WeightFormat.BFLOAT16, CPU, exact=True) is NativeHalf
    assert widens(WeightFormat.BFLOAT16, CPU)
    monkeypatch.setattr(kernel_choice, "_try", lambda *_: None)
    kernel_choice._fastest.cache_clear()
    assert not widens(WeightFormat.BFLOAT16, CPU)
