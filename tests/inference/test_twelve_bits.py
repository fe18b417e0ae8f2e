"""bfloat16 in 12 bits: nothing is lost, and products are the same."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from petals.inference import linear, twelve_bits
from petals.inference.kernels import NativeHalf, NativeKernel, WeightFormat
from petals.inference.linear import pack_linear
from petals.inference.native import Native, native
from petals.inference.packed import described, unpacked

NUMBERS = (0.0, -0.0, 1e-40, -3e38, 1e30, math.inf, math.nan)
"""Of exponents that normal weights don't have."""


@pytest.fixture(scope="module")
def library() -> Native:
    found = native()
    if found is None or not found.packer.has_twelve_bits:
        pytest.skip("our kernels cannot be had on this machine")
    return found


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().contiguous().view(torch.int32)


@given(
    features=st.integers(1, 100),
    inputs=st.integers(1, 70),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    rare=st.lists(st.sampled_from(NUMBERS)),
)
def test_nothing_is_lost(
    library: Native, features: int, inputs: int, spread: float, rare: list[float]
) -> None:
    weight = normal(features, inputs) * torch.exp(spread * normal(features, inputs, seed=1))
    places = torch.randperm(weight.numel())[: len(rare)]
    weight.view(-1)[places] = torch.tensor(rare)[: len(places)]
    weight = weight.bfloat16()
    with patch.object(twelve_bits, "_MOST_OTHERS", 1.0):
        packed = library.packer.pack_twelve(weight)
    assert packed is not None
    held = unpacked(packed, 0, len(packed.data)).transpose(1, 2).reshape(-1, inputs)
    assert torch.equal(bits(held[:features]), bits(weight))
    last = len(packed.data) - 1
    assert torch.equal(
        bits(unpacked(packed, last, last + 1)), bits(unpacked(packed, 0, last + 1)[last:])
    )


@given(
    features=st.integers(1, 200) | st.integers(1024, 2100),
    inputs=st.sampled_from([1, 63, 100, 2048, 2049, 5000]),
    rows=st.sampled_from([1, 2, 3, 4, 7, 8, 13, 14, 15, 29, 112, 113]),
    rare=st.integers(0, 40),
)
def test_products_are_those_of_16_bits(
    library: Native, features: int, inputs: int, rows: int, rare: int
) -> None:
    weight = (normal(features, inputs) / math.sqrt(inputs)).bfloat16()
    weight.view(-1)[torch.randint(weight.numel(), (rare,))] = 2.0**-30
    weight.view(-1)[torch.randint(weight.numel(), (rare,))] = 64.0
    with patch.object(twelve_bits, "_MOST_OTHERS", 1.0):
        packed = library.packer.pack_twelve(weight)
    assert packed is not None
    bias, x = normal(packed.padded, seed=1), normal(rows, inputs, seed=2)
    result = library.multiply(x, packed, bias)
    expected = library.multiply(x, library.packer.pack(weight), bias)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-4)
    alone = library.multiply(x[-1:], packed, bias)
    assert torch.equal(alone[0], result[-1]), "a row does not depend on those beside it"
    for streams in library.streams:
        assert torch.equal(alone, library.multiply(x[-1:], packed, bias, streams=streams))
    chosen = sorted({0, len(packed.data) // 2, len(packed.data) - 1})
    panels = len(packed.data)
    some = torch.full((min(len(x), 4), 2 * packed.padded), 7.0)
    few = x[: len(some)].contiguous()
    library.multiply_panels(
        few, described([packed, packed]), [*chosen, panels, 2 * panels - 1], some
    )
    whole = library.multiply(few, packed, None)
    for number, panel in enumerate(some.split(packed.panel, dim=1)):
        first = number % panels * packed.panel
        expected = whole[:, first : first + packed.panel]
        if number not in (*chosen, panels, 2 * panels - 1):
            expected = torch.full_like(expected, 7.0)
        assert torch.equal(panel[:, : expected.shape[1]], expected)


def test_what_is_not_finite_stays_visible(library: Native) -> None:
    weight = normal(64, 1000).bfloat16()
    packed = library.packer.pack_twelve(weight)
    assert packed is not None
    for value in (math.nan, math.inf):
        x = normal(3, 1000, seed=1)
        x[1, 7] = value
        finite = library.multiply(x, packed, None).isfinite()
        assert finite[::2].all()
        assert not finite[1].any()


def test_three_quarters_of_the_memory_unless_that_would_lose_something(library: Native) -> None:
    weight = normal(256, 1000).bfloat16()
    everywhere = (normal(256, 1000) * torch.exp(20 * normal(256, 1000, seed=1))).bfloat16()
    with patch.object(linear, "choose_kernel", lambda *_, **__: NativeHalf):
        packed = [held(matrix).packed for matrix in (weight, everywhere, weight.half())]
    assert [each.data.nbytes / weight.nbytes for each in packed] == [0.75, 1.0, 1.0]
    assert [each.data.dtype for each in packed[1:]] == [torch.bfloat16, torch.float16]
    assert library.packer.pack_twelve(weight.half()) is None
    again = unpacked(packed[1], 0, len(packed[1].data)).transpose(1, 2).reshape(256, 1000)
    assert torch.equal(again, everywhere.float()), "of 16 bits, what is held can be read, too"


def held(matrix: torch.Tensor) -> NativeKernel:
    """As blocks hold it."""
    weights = WeightFormat(str(matrix.dtype).removeprefix("torch."))
    whole = pack_linear(matrix.shape, lambda a, b: matrix[a:b], None, weights, torch.device("cpu"))
    (kernel,) = whole.kernels
    assert isinstance(kernel, NativeKernel)
    return kernel
