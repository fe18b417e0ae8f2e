"""Kernels: every one that works here multiplies as it says, and rows don't touch one another."""

import math
from functools import partial

import pytest
import torch
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
)
from petals.inference.linear import PIECE, pack_linear
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
