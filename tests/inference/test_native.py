"""Our kernels against torch."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from petals.inference.lanes import CachedLanes, DecodingRows, lane_memory
from petals.inference.native import Native, native, open_native
from petals.inference.quantizing import NF4_GROUP, NF4_LEVELS, Int8Weights
from support.rounding import nearest_nf4
from torch.nn import functional as F

HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def library() -> Native:
    found = native()
    if found is None:
        pytest.skip("our kernels cannot be had on this machine")
    return found


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    features=st.integers(1, 200) | st.integers(1024, 2100),  # many are walked through otherwise
    inputs=st.sampled_from([1, 63, 64, 100, 2048, 2049, 5000]),
    rows=st.sampled_from([1, 2, 3, 4, 7, 8, 13, 14, 15, 29, 112, 113, 250]),
    dtype=st.sampled_from((torch.float32, *HALVES)),
    biased=st.booleans(),
)
def test_rows_times_a_matrix(
    library: Native, features: int, inputs: int, rows: int, dtype: torch.dtype, *, biased: bool
) -> None:
    weight = (normal(features, inputs) / math.sqrt(inputs)).to(dtype)
    packed = library.packer.pack(weight)
    bias = normal(packed.padded, seed=1) if biased else None
    x = normal(rows, inputs, seed=2)
    result = library.multiply(x, packed, bias)
    expected = F.linear(x, weight.float(), None if bias is None else bias[:features])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-5)
    row = rows // 2
    alone = library.multiply(x[row : row + 1], packed, bias)
    assert torch.equal(alone[0], result[row]), "a row does not depend on those beside it"
    for streams in library.streams:
        apart = library.multiply(x[row : row + 1], packed, bias, streams=streams)
        assert torch.equal(alone, apart), "nor on how memory is read"
    with pytest.raises(ValueError, match="streams"):
        library.multiply(x, packed, bias, streams=3)


@pytest.mark.usefixtures("library")
def test_products_are_the_same_while_it_is_tried_how_memory_is_read_fastest() -> None:
    library = open_native()  # which has tried nothing yet
    packed = library.packer.pack(normal(4096, 512).half())
    assert packed.large
    x = normal(1, 512, seed=1)
    expected = library.multiply(x, packed, None, streams=4)
    for _ in range(250):
        assert torch.equal(library.multiply(x, packed, None), expected)


@given(
    features=st.sampled_from([7, 64, 200, 1024]),
    rows=st.sampled_from([1, 5, 16, 113]),
    biased=st.booleans(),
    gelu=st.booleans(),
    added=st.sampled_from([None, "contiguous", "rows apart", "columns apart"]),
    large=st.sampled_from([1.0, 30.0, 1e18]),
    into=st.booleans(),
)
def test_what_is_done_with_a_product_on_the_way(
    library: Native,
    features: int,
    rows: int,
    added: str | None,
    large: float,
    *,
    biased: bool,
    gelu: bool,
    into: bool,
) -> None:
    weight = normal(features, 100) / 10
    packed = library.packer.pack(weight)
    bias = normal(packed.padded, seed=1) if biased else None
    x = large * normal(rows, 100, seed=2)
    residual = None
    if added is not None:
        residual = normal(rows, features, seed=3)
        if added == "rows apart":
            residual = F.pad(residual, (3, 4))[:, 3:-4]
        elif added == "columns apart":
            residual = residual.t().contiguous().t()
    wide = torch.full((rows, features + 5), 7.0)
    out = wide[:, 2:-3] if into else None
    result = library.multiply(x, packed, bias, gelu=gelu, residual=residual, out=out)
    assert out is None or out is result
    assert (wide[:, :2] == 7).all()
    assert (wide[:, -3:] == 7).all()
    expected = library.multiply(x, packed, bias)
    if gelu:
        expected = F.gelu(expected, approximate="tanh")
    if residual is not None:
        expected = residual + expected
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=5e-7)
    x[-1, 0] = torch.nan
    visible = library.multiply(x, packed, bias, gelu=gelu, residual=residual)[-1]
    assert torch.isnan(visible).all(), "what is not finite stays visible"


@given(
    features=st.integers(1, 130),
    inputs=st.sampled_from([1, 63, 64, 100, 2048, 2049, 5000]),
    rows=st.sampled_from([1, 2, 3, 4, 8, 14, 15, 113]),
    four_bits=st.booleans(),
)
def test_rows_times_a_matrix_of_few_bits(
    library: Native, features: int, inputs: int, rows: int, *, four_bits: bool
) -> None:
    weight = normal(features, inputs) / math.sqrt(inputs)
    weight[0] = 0.0
    x = normal(rows, inputs, seed=2)
    in_pairs = library.packer.has_pairs
    multiplied = x.bfloat16().float() if in_pairs else x
    if four_bits:
        few = nearest_nf4(weight)
        packed = library.packer.pack_nf4(few)
        scales = few.scales.repeat_interleave(NF4_GROUP, dim=1)[:, :inputs]
        levels = torch.tensor(NF4_LEVELS)
        levels = levels.bfloat16().float() if in_pairs else levels
        stands_for = levels[few.codes.int()] * scales
    else:
        whole = Int8Weights.nearest(weight)
        packed = library.packer.pack_int8(whole)
        stands_for = whole.integers * whole.scales[:, None]
    bias = normal(packed.padded, seed=1)
    result = library.multiply(x, packed, bias)
    expected = F.linear(multiplied, stands_for, bias[:features])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-5)
    for streams in library.streams:
        alone = library.multiply(x[-1:], packed, bias, streams=streams)
        assert torch.equal(alone[0], result[-1]), "a row does not depend on those beside it"


@given(
    features=st.integers(1, 40),
    inputs=st.sampled_from([1, 63, 64, 65, 1000]),
    dtype=st.sampled_from((torch.float64, torch.float32, *HALVES)),
    spread=st.sampled_from([0.0, 3.0]),
)
def test_rounding_to_few_bits_is_that_of_torch(
    library: Native, features: int, inputs: int, dtype: torch.dtype, spread: float
) -> None:
    weight = normal(features, inputs) * torch.exp(spread * normal(features, inputs, seed=1))
    weight[0] = 0.0
    weight = weight.clamp(-60_000, 60_000).to(dtype)
    eight, four = library.packer.nearest_int8(weight), library.packer.nearest_nf4(weight)
    assert torch.equal(eight.integers, Int8Weights.nearest(weight).integers)
    assert torch.equal(eight.scales, Int8Weights.nearest(weight).scales)
    assert torch.equal(four.codes, nearest_nf4(weight).codes)
    assert torch.equal(four.scales, nearest_nf4(weight).scales)


@given(
    lengths=st.lists(st.integers(0, 2100), min_size=1, max_size=4),
    shape=st.sampled_from([(4, 4, 64), (6, 2, 80), (3, 3, 5), (2, 1, 128), (2, 2, 104)]),
    room=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, *HALVES]),
    slope=st.sampled_from([None, 0.002, 0.1, 0.7]),
    scale=st.sampled_from([0.3, 4.0]),  # what is far away is heard with the larger one
    window=st.sampled_from([None, 1, 17, 1030]),
    softcap=st.sampled_from([None, 0.5, 50.0]),
    streams=st.sampled_from([None, 2, 8]),
)
def test_attention_of_rows_that_decode(
    library: Native,
    lengths: list[int],
    shape: tuple[int, int, int],
    room: int,
    dtype: torch.dtype,
    slope: float | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    streams: int | None,
) -> None:
    heads, cache_heads, head_dim = shape
    batch = len(lengths) + 2  # the first and the last row belong to nobody here
    query = normal(batch, heads, head_dim, seed=1).transpose(0, 1)
    key = normal(cache_heads, batch, head_dim, seed=2)
    value = normal(batch, cache_heads, head_dim, seed=3).transpose(0, 1)
    capacities = [length + 1 + room for length in lengths]
    caches = [
        (
            normal(cache_heads, capacity, head_dim, seed=4).to(dtype),
            normal(cache_heads, capacity, head_dim, seed=5).to(dtype),
        )
        for capacity in capacities
    ]
    for (keys, values), length in zip(caches, lengths, strict=True):
        keys[:, length:] = values[:, length:] = torch.nan  # never written, never seen
    slopes = None if slope is None else torch.full((heads,), slope)
    output = torch.full((batch, heads, head_dim), 7.0)
    rows = range(1, batch - 1)
    options: dict[str, Any] = {"slopes": slopes, "window": window, "softcap": softcap}
    options["streams"] = None if streams is None else min(streams, library.streams[-1])
    norms = [
        keys[:, :length].float().norm(dim=2).amax(dim=1) if length else torch.zeros(cache_heads)
        for (keys, _), length in zip(caches, lengths, strict=True)
    ]
    known = [(*cached, own) for cached, own in zip(caches, norms, strict=True)]
    other = lane_memory(*known[0])  # a block before: nobody reads it
    memory = [np.array([other, lane_memory(*own)]) for own in known]
    lanes = CachedLanes(memory, lengths, rows, dtype)
    views = query[None], key[None], value[None]
    library.decode_attention(
        DecodingRows.separate(*views), output, lanes, 1, scale=scale, **options
    )
    assert (output[0] == 7).all()
    assert (output[-1] == 7).all()
    for (keys, values, norm), length, row in zip(known, lengths, rows, strict=True):
        assert torch.equal(keys[:, length], key[:, row].to(dtype))
        assert torch.equal(values[:, length], value[:, row].to(dtype))
        assert (norm >= keys[:, : length + 1].float().norm(dim=2).amax(dim=1)).all()
        used, group = length + 1, heads // cache_heads
        all_keys = keys[:, :used].double().repeat_interleave(group, dim=0)
        all_values = values[:, :used].double().repeat_interleave(group, dim=0)
        scores = torch.einsum("hd,htd->ht", query[:, row].double(), all_keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if slope is not None:
            scores += slope * torch.arange(-length, 1)
        if window is not None:
            scores[:, : max(0, used - window)] = -torch.inf
        expected = torch.einsum("ht,htd->hd", scores.softmax(dim=-1), all_values)
        # a score's rounding grows with it, and is a weight's relative error
        atol = 1e-5 * max(1.0, scale)
        torch.testing.assert_close(output[row].double(), expected, rtol=1e-4, atol=atol)


def test_lanes_go_on_in_the_same_table_while_there_is_room() -> None:
    caches = [(torch.zeros(1, room, 4), torch.zeros(1, room, 4), torch.zeros(1)) for room in (9, 5)]
    memory = [np.array([lane_memory(*cache)]) for cache in caches]
    lanes = CachedLanes(memory, [3, 2], [0, 1], torch.float32)
    assert [lanes.set_lengths(lengths) for lengths in ([8, 4], [9, 4], [0, 5])] == [
        True,
        False,
        False,
    ]


def test_what_is_not_finite_stays_visible(library: Native) -> None:
    query, key, value = normal(2, 1, 8, seed=1), normal(2, 1, 8, seed=2), normal(2, 1, 8, seed=3)
    for bad in (query, key, value):
        kept = bad.clone()
        bad[1, 0, 3] = torch.nan
        cache = normal(2, 64, 8, seed=4), normal(2, 64, 8, seed=5), torch.full((2,), 100.0)
        output = torch.zeros(1, 2, 8)
        lanes = CachedLanes([np.array([lane_memory(*cache)])], [40], [0], torch.float32)
        views = query[None], key[None], value[None]
        library.decode_attention(
            DecodingRows.separate(*views), output, lanes, 0, scale=1.0, slopes=None
        )
        assert torch.isfinite(output[0, 0]).all()
        if bad is not key:  # a key that is NaN comes with such a value
            assert torch.isnan(output[0, 1]).any()
        bad.copy_(kept)


def test_what_no_query_can_hear_is_not_read(library: Native) -> None:
    """Keys are not longer than is said: what lies behind that bound and ALiBi's distance is left out."""
    query, key, value = (normal(1, 1, 32, seed=seed)[None] for seed in (3, 4, 5))
    keys, values = normal(1, 2001, 32, seed=1), normal(1, 2001, 32, seed=2)
    keys[:, :1000], values[:, :1000] = 1e3 * query[0, 0], 7.0  # as loud as can be, far away
    loudest = float(keys[:, :2000].norm(dim=2).amax())
    for said, heard in ((10.0, False), (loudest, True), (math.inf, True)):
        output = torch.zeros(1, 1, 32)
        memory = np.array([lane_memory(keys, values, longest := torch.tensor([said]))])
        lanes, slopes = CachedLanes([memory], [2000], [0], torch.float32), torch.tensor([0.3])
        new = DecodingRows.separate(query, key, value)
        library.decode_attention(new, output, lanes, 0, scale=1.0, slopes=slopes)
        assert longest >= said
        assert torch.allclose(output, torch.tensor(7.0)) == heard


def test_what_does_not_fit_is_refused(library: Native) -> None:
    packed = library.packer.pack(torch.ones(32, 16).half())
    with pytest.raises(ValueError, match="by a matrix of 16"):
        library.multiply(torch.ones(1, 17), packed, None)
    for residual in (torch.ones(2, 32), torch.ones(1, 31), torch.ones(1, 32).half()):
        with pytest.raises(ValueError, match="is no residual"):
            library.multiply(torch.ones(1, 16), packed, None, residual=residual)
    for room in (torch.ones(2, 32), torch.ones(1, 33), torch.ones(1, 32).half()):
        with pytest.raises(ValueError, match="has no room"):
            library.multiply(torch.ones(1, 16), packed, None, out=room)
    with pytest.raises(TypeError, match="float64"):
        library.packer.pack(torch.ones(32, 16).double())
