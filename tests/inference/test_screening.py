"""The screened head: the largest output is what the whole head has there, bit for bit."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from petals.inference import screening, twelve_bits
from petals.inference.kernels import NativeFloat, NativeHalf, NativeTwelve
from petals.inference.linear import Linear
from petals.inference.native import Native, native
from petals.inference.screening import ScreenedLinear, screened

FEATURES = 32 * 64
KERNELS = {
    torch.float32: NativeFloat,
    torch.float16: NativeHalf,
    torch.bfloat16: NativeTwelve,
}


@pytest.fixture(scope="module")
def library() -> Native:
    found = native()
    if found is None:
        pytest.skip("our kernels cannot be had on this machine")
    return found


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def head_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """In pieces, as large heads are."""
    pieces = weight.split(FEATURES // 4)
    biases = [None] * len(pieces) if bias is None else bias.split(FEATURES // 4)
    kernel = KERNELS[weight.dtype]
    with patch.object(twelve_bits, "_MOST_OTHERS", 1.0):
        return Linear([kernel(*piece) for piece in zip(pieces, biases, strict=True)])


def largest_of(head: ScreenedLinear, rows: torch.Tensor) -> torch.Tensor:
    with head.largest_only():
        output: torch.Tensor = head(rows)
    return output


@given(
    seed=st.integers(0, 99),
    features=st.integers(FEATURES - 33, FEATURES + 40),
    inputs=st.sampled_from([64, 100, 1024]),
    count=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
)
def test_the_largest_output_is_exact(
    library: Native,
    seed: int,
    features: int,
    inputs: int,
    count: int,
    dtype: torch.dtype,
    spread: float,
) -> None:
    """Also when features differ in scale by orders of magnitude."""
    weight = normal(features, inputs, seed=seed) / math.sqrt(inputs)
    weight *= torch.exp(spread * normal(features, 1, seed=seed + 1))
    whole = head_of(weight.clamp_(-60_000, 60_000).to(dtype))  # what float16 has
    rows = normal(count, inputs, seed=seed + 2)
    expected = whole(rows)
    output = largest_of(ScreenedLinear(whole, library), rows)
    assert output.shape == expected.shape
    assert torch.equal(output.argmax(dim=1), expected.argmax(dim=1))
    assert torch.equal(output.amax(dim=1), expected.amax(dim=1))


@pytest.mark.parametrize(
    ("features", "inputs", "most"),
    [(FEATURES, 1024, 0.25), (FEATURES - 5, 1024, 0.25), (FEATURES, 8192, 0.5)],
)
def test_most_outputs_are_not_computed_from_the_weights(
    library: Native, features: int, inputs: int, most: float
) -> None:
    """The wider the rows, the less a bound says beside what outputs differ by."""
    whole = head_of(normal(features, inputs).half())
    head, rows = ScreenedLinear(whole, library), normal(1, inputs, seed=1)
    same = largest_of(head, rows) == whole(rows)
    assert 0 < same.sum() < most * FEATURES
    assert torch.equal(head(rows), whole(rows)), "all of them are, when all are wanted"


def test_what_eight_bits_cannot_tell_apart_is_told_apart(library: Native) -> None:
    """Among outputs that are equal or nearly so, the first of the largest is found."""
    weight = normal(FEATURES, 256).half()
    rows = normal(1, 256, seed=1)
    first = int((rows @ weight.float().T).argmax())
    weight[1000] = weight[first] * 1.001
    weight[2001] = weight[1000]
    whole = head_of(weight)
    assert int(largest_of(ScreenedLinear(whole, library), rows).argmax()) == 1000
    assert int(whole(rows).argmax()) == 1000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_no_number_stays_one(library: Native, value: float) -> None:
    whole = head_of(normal(FEATURES, 64).half())
    rows = normal(1, 64)
    rows[0, 3] = value
    assert torch.equal(
        largest_of(ScreenedLinear(whole, library), rows).isfinite(), whole(rows).isfinite()
    )


def test_when_all_outputs_are_alike_all_are_computed(library: Native) -> None:
    whole = head_of(normal(1, 64).half().expand(FEATURES, 64))
    rows = normal(2, 64, seed=1)
    assert torch.equal(largest_of(ScreenedLinear(whole, library), rows), whole(rows))


def test_screening_pauses_where_it_is_in_vain(library: Native) -> None:
    whole = head_of(normal(1, 64).half().expand(FEATURES, 64))
    head, row = ScreenedLinear(whole, library), normal(1, 64, seed=1)
    with (
        patch.object(screening, "_PAUSE", 20),
        patch.object(library, "find_highest", wraps=library.find_highest) as screened_now,
    ):
        counts = []
        for _ in range(60):
            assert torch.equal(largest_of(head, row), whole(row))
            counts.append(screened_now.call_count)
    pauses = [tried for tried in set(counts) if counts.count(tried) > 20]
    assert len(pauses) >= 2, "it is tried again, and stopped again"
    assert counts[-1] < 30


def test_many_rows_are_computed_whole(library: Native) -> None:
    whole = head_of(normal(FEATURES, 64).half())
    rows = normal(5, 64, seed=1)
    assert torch.equal(largest_of(ScreenedLinear(whole, library), rows), whole(rows))


def test_only_heads_that_gain_by_it_are_screened(library: Native) -> None:
    weight = normal(FEATURES, 64).half()
    with patch.object(screening, "_LEAST_WEIGHTS", 1000):
        assert isinstance(screened(head_of(weight)), ScreenedLinear)
        with_bias = head_of(weight, torch.zeros(FEATURES))
        assert screened(with_bias) is with_bias
        with patch.object(screening, "free_memory", lambda _: FEATURES * 64 * 2):
            whole = head_of(weight)
            assert screened(whole) is whole, "there is no memory for it"
        whole = Linear(
            [
                NativeHalf(part.to(dtype), None)
                for part, dtype in zip(
                    weight.split(FEATURES // 2), (torch.float16, torch.bfloat16), strict=True
                )
            ]
        )
        assert screened(whole) is whole, "its pieces are held in different ways"
    small = head_of(weight)
    assert screened(small) is small
