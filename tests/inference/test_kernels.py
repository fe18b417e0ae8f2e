"""Kernels: every one that works here multiplies as it says, and rows don't touch one another."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from petals.inference import kernels
from petals.inference.kernels import (
    BitsandbytesInt8,
    BitsandbytesNf4,
    FbgemmHalf,
    FbgemmInt8,
    Kernel,
    MakeKernel,
    NativeFloat,
    NativeHalf,
    PackedInt4,
    Plain,
    Reordered,
    WeightFormat,
    WeightOnlyInt8,
    choose_kernel,
    probe_seconds,
    widens,
)
from petals.inference.linear import PIECE, pack_linear
from petals.protocol.errors import ConfigError
from torch.nn import functional as F

CPU = torch.device("cpu")
EVERY_KERNEL: list[tuple[MakeKernel, torch.dtype, float]] = [
    (Plain, torch.float32, 1e-6),
    (Plain, torch.float16, 1e-3),
    (Plain, torch.bfloat16, 1e-2),
    (Reordered, torch.float32, 1e-6),
    (Reordered, torch.bfloat16, 1e-2),
    (NativeFloat, torch.float32, 1e-6),
    (NativeHalf, torch.float16, 1e-6),
    (NativeHalf, torch.bfloat16, 1e-6),
    (FbgemmHalf, torch.float16, 1e-6),
    (FbgemmInt8, torch.float32, 0.012),
    (WeightOnlyInt8, torch.float32, 0.02),
    (PackedInt4, torch.float32, 0.12),
    (BitsandbytesNf4, torch.bfloat16, 0.12),
    (BitsandbytesInt8, torch.float16, 0.03),
]


def made(make: MakeKernel, weight: torch.Tensor, bias: torch.Tensor | None) -> Kernel:
    """The kernel, or the test skipped where this processor or installation has none."""
    try:
        kernel = make(weight, bias)
        kernel(torch.zeros(1, weight.shape[1]))
    except (RuntimeError, ImportError) as error:
        pytest.skip(f"not here: {error}")
    return kernel


def matrix(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((out_features, in_features), generator=generator)
    return values.div_(math.sqrt(in_features))


@pytest.mark.parametrize(("make", "dtype", "tolerance"), EVERY_KERNEL)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_a_kernel_multiplies(
    make: MakeKernel, dtype: torch.dtype, tolerance: float, rows: int
) -> None:
    weight, bias = matrix(192, 256).to(dtype), torch.linspace(-1, 1, 192)
    x = matrix(rows, 256, seed=1) * 30
    result = made(make, weight, bias)(x)
    expected = F.linear(x, weight.float(), bias)
    assert result.dtype == torch.float32
    assert (result - expected).norm() / expected.norm() < tolerance


def test_an_int8_row_does_not_depend_on_the_rows_beside_it() -> None:
    kernel = made(FbgemmInt8, matrix(192, 256), None)
    x = matrix(40, 256, seed=1)
    x[7] *= 1000
    together = kernel(x)
    for row in (0, 6, 39):
        assert torch.equal(kernel(x[row : row + 1])[0], together[row])


def test_int8_rows_of_any_size() -> None:
    kernel = made(FbgemmInt8, matrix(64, 64), None)
    x = torch.cat([torch.zeros(1, 64), torch.full((1, 64), 1e-30), torch.full((1, 64), 1e6)])
    result = kernel(x)
    assert torch.isfinite(result).all()
    assert (result[0] == 0).all()
    assert torch.isnan(kernel(torch.full((1, 64), torch.nan))).any(), "what is bad stays visible"


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_a_kernel_is_found_for_every_format(weights: WeightFormat) -> None:
    assert choose_kernel(weights, CPU) is choose_kernel(weights, CPU), "it is measured once"
    assert probe_seconds(weights, CPU) > 0


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
    monkeypatch.setattr(kernels, "_KERNELS", choices)
    kernels._fastest.cache_clear()
    try:
        assert choose_kernel(WeightFormat.FLOAT32, CPU) is Plain
        with pytest.raises(ConfigError, match="nothing here can compute with nf4"):
            choose_kernel(WeightFormat.NF4, CPU)
    finally:
        kernels._fastest.cache_clear()


def test_the_least_that_any_process_found_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside others that compute, a kernel that uses all cores looks slow, and one of one core does not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "petals-node" / "kernels.json"

    def chosen(**seconds: float) -> MakeKernel:
        kernels._fastest.cache_clear()
        takes = {getattr(kernels, name): taken for name, taken in seconds.items()}
        monkeypatch.setattr(
            kernels, "_try", lambda kernel, *_: lambda _: takes.get(kernel, 1e3) + 1e-9
        )
        return choose_kernel(WeightFormat.FLOAT16, CPU)

    try:
        assert chosen(NativeHalf=5.0, FbgemmHalf=2.0) is FbgemmHalf
        assert chosen(NativeHalf=1.0, FbgemmHalf=1.5) is NativeHalf
        assert chosen(NativeHalf=9.0, FbgemmHalf=2.0) is NativeHalf
        for damage in ("{", "[]", '{"a": 1}', "null"):
            file.write_text(damage)
            assert chosen(NativeHalf=9.0, FbgemmHalf=2.0) is FbgemmHalf
        known = json.loads(file.read_text())
        nonsense: list[object] = ["0.1", None, -1.0, [], math.nan]
        for value in nonsense:
            file.write_text(
                json.dumps({key: dict.fromkeys(own, value) for key, own in known.items()})
            )
            assert chosen(NativeHalf=1.0, FbgemmHalf=1.5) is NativeHalf
            assert chosen(NativeHalf=9.0, FbgemmHalf=2.0) is NativeHalf
    finally:
        kernels._fastest.cache_clear()


def test_what_rounds_rows_is_not_taken_for_what_is_to_be_exact(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However fast it is: checkpoints in bfloat16 give the text of float32 by default."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    takes = {NativeHalf: 9.0, Reordered: 1.0}
    monkeypatch.setattr(kernels, "_try", lambda kernel, *_: lambda _: takes.get(kernel, 99.0))
    kernels._fastest.cache_clear()
    try:
        assert choose_kernel(WeightFormat.BFLOAT16, CPU) is Reordered
        assert choose_kernel(WeightFormat.BFLOAT16, CPU, exact=True) is NativeHalf
        assert widens(WeightFormat.BFLOAT16, CPU)
        monkeypatch.setattr(kernels, "_try", lambda *_: None)
        kernels._fastest.cache_clear()
        assert not widens(WeightFormat.BFLOAT16, CPU)
    finally:
        kernels._fastest.cache_clear()


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_a_linear_in_pieces_is_a_linear(
    weights: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petals.inference.linear.PIECE", 128 * 64)
    weight, bias = matrix(320, 128), torch.linspace(-1, 1, 320)
    read: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> torch.Tensor:
        read.append((start, stop))
        return weight[start:stop]

    linear = pack_linear(weight.shape, rows, bias, weights, CPU)
    assert read == [(start, start + 64) for start in range(0, 320, 64)]
    x = torch.randn(2, 3, 128)
    expected = F.linear(x, weight, bias)
    result = linear(x)
    assert result.shape == (2, 3, 320)
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2, "int8": 0.02}
    error = (result - expected).norm() / expected.norm()
    assert error < tolerance.get(weights, 0.12)
    torch.testing.assert_close(linear.gelu(x), F.gelu(result, approximate="tanh"))
    torch.testing.assert_close(linear.added_to(expected, x), expected + result)
    monkeypatch.setattr("petals.inference.linear.PIECE", PIECE)
    whole = pack_linear(weight.shape, rows, bias, weights, CPU)
    torch.testing.assert_close(whole.gelu(x), F.gelu(whole(x), approximate="tanh"))
    torch.testing.assert_close(whole.added_to(expected, x), expected + whole(x))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("weights", list(WeightFormat))
def test_a_row_that_is_not_finite_changes_no_other(weights: WeightFormat, bad: float) -> None:
    weight = matrix(192, 256)
    linear = pack_linear(weight.shape, lambda a, b: weight[a:b], None, weights, CPU)
    for count in (2, 5, 40):
        x, residual = torch.randn(count, 256), torch.randn(count, 192)
        poisoned = x.clone()
        poisoned[1, 7] = bad
        others = [row for row in range(count) if row != 1]
        for run in (linear, linear.gelu, partial(linear.added_to, residual)):
            assert torch.equal(run(poisoned)[others], run(x)[others])


def test_float32_weights_that_float16_holds_lose_nothing_and_others_neither() -> None:
    x = torch.randn(4, 64)

    def error(weight: torch.Tensor) -> float:
        linear = pack_linear(
            weight.shape, lambda a, b: weight[a:b], None, WeightFormat.FLOAT32, CPU
        )
        expected = F.linear(x.double(), weight.double())
        return float((linear(x) - expected).norm() / expected.norm())

    assert error(matrix(128, 64).half().float()) < 1e-6
    assert error(matrix(128, 64)) < 1e-6


def test_a_matrix_that_does_not_divide_into_groups_stays_in_16_bits() -> None:
    weight = matrix(30, 40)
    for weights in (WeightFormat.NF4, WeightFormat.INT8):
        linear = pack_linear(weight.shape, lambda a, b: weight[a:b], None, weights, CPU)
        x = torch.randn(3, 40)
        assert (linear(x) - F.linear(x, weight)).norm() / F.linear(x, weight).norm() < 0.12


def test_pieces_are_bounded() -> None:
    assert PIECE * 4 == 128 * 2**20
