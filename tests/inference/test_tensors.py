"""Tensors come back as they were sent, without a copy where none is needed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from petals.inference import wire_int8
from petals.inference.native import native
from petals.inference.tensors import to_torch, to_wire, torch_dtype, wire_dtype
from petals.protocol.tensor import DType, WireTensor

PLAIN = [DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16]


@given(
    dtype=st.sampled_from(PLAIN),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    kind=st.sampled_from([bytes, bytearray, memoryview]),
    offset=st.integers(0, 9),
)
def test_there_and_back(
    dtype: DType, shape: tuple[int, ...], kind: type[bytes], offset: int
) -> None:
    tensor = torch.randn(shape).to(torch_dtype(dtype))
    wire = to_wire(tensor)
    assert (wire.dtype, wire.shape) == (dtype, shape)
    frame = bytes(offset) + bytes(wire.data)
    data = memoryview(kind(frame))[offset:]
    received = to_torch(WireTensor(dtype, shape, data))
    assert torch.equal(received, tensor)


def test_bytes_are_little_endian_and_row_major() -> None:
    wire = to_wire(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, DType.FLOAT32)
    assert bytes(wire.data).hex() == "0000803f000040400000004000008040"


def test_no_copies_of_what_is_large() -> None:
    tensor = torch.randn(300, 400)
    tensor.view(-1)[0] = 5
    wire = to_wire(tensor)
    tensor.view(-1)[0] = 7
    assert to_torch(wire)[0, 0] == 7
    frame = bytearray(80_000)
    received = to_torch(WireTensor(DType.FLOAT32, (20_000,), memoryview(frame)))
    frame[:4] = bytes.fromhex("0000803f")
    assert received[0] == 1


def test_conversions() -> None:
    tensor = torch.randn(3, 4)
    wire = to_wire(tensor, DType.BFLOAT16)
    assert wire.dtype is DType.BFLOAT16
    assert torch.equal(to_torch(wire, dtype=torch.float32), tensor.bfloat16().float())
    with torch.inference_mode():
        assert to_wire(tensor * 1).shape == (3, 4)


def test_dtypes_that_do_not_travel() -> None:
    assert wire_dtype(torch.float16) is DType.FLOAT16
    with pytest.raises(ValueError, match=r"torch\.int64 does not travel"):
        to_wire(torch.zeros(2, dtype=torch.int64))


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 200)),
    offset=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_int8_is_near(shape: tuple[int, ...], offset: int, seed: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    wire = to_wire(tensor, DType.INT8)
    assert (wire.dtype, wire.shape) == (DType.INT8, shape)
    frame = memoryview(bytes(offset) + bytes(wire.data))[offset:]
    received = to_torch(WireTensor(DType.INT8, shape, frame))
    assert (received.shape, received.dtype) == (tensor.shape, torch_dtype(DType.INT8))
    # Half a step of the largest magnitude of any block, and the rounding of the scale itself.
    assert (received - tensor).abs().max() <= tensor.abs().max() / 127 * 0.5 * (1 + 1e-5)


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 300)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
    bad=st.sampled_from([None, math.inf, -math.inf, math.nan]),
)
def test_int8_is_the_same_with_our_kernels_and_without(
    shape: tuple[int, int], dtype: torch.dtype, seed: int, bad: float | None
) -> None:
    if native() is None:
        pytest.skip("our kernels cannot be had on this machine")
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tensor = (tensor * torch.exp(3 * tensor.roll(1))).to(dtype)
    if bad is not None:
        tensor.view(-1)[seed % tensor.numel()] = bad
    packed = wire_int8.pack(tensor)
    by_torch = wire_int8.pack_by_torch(tensor)
    values = wire_int8.unpack(packed, shape)
    expected = wire_int8.unpack_by_torch(by_torch, shape)
    assert torch.equal(values.isfinite(), expected.isfinite())
    assert torch.equal(values.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0))
    assert torch.equal(wire_int8.unpack_by_torch(packed, shape).isfinite(), values.isfinite())
    if expected.isfinite().all():
        assert torch.equal(packed, by_torch)


def test_the_error_of_int8_on_normal_rows() -> None:
    tensor = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)) * 37
    error = to_torch(to_wire(tensor, DType.INT8)) - tensor
    assert error.square().mean().sqrt() / tensor.square().mean().sqrt() < 0.007
    sixteen_bit = to_wire(tensor.bfloat16(), DType.INT8)
    assert to_torch(sixteen_bit, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_layout_of_int8() -> None:
    """Two rows of 65 values: two scales and 65 bytes each, so that rows can be cut apart."""
    rows = torch.zeros(2, 65)
    rows[0, 0], rows[0, 1], rows[0, 64] = 127, -2, 254
    data = bytes(to_wire(rows, DType.INT8).data)
    assert len(data) == 2 * DType.INT8.row_bytes(65) == 2 * 73
    assert data[:8].hex() == "0000803f00000040"
    assert data[8:73] == bytes([127, 254]) + bytes(62) + bytes([127])
    assert data[73:] == bytes(73)
    [second] = to_torch(WireTensor(DType.INT8, (1, 65), data[73:]))
    assert torch.equal(second, torch.zeros(65))


def test_a_tiny_value_gives_something_near_it_in_int8() -> None:
    tensor = torch.tensor([[1e-40, -1e-44, 0.0]])
    assert to_torch(to_wire(tensor, DType.INT8)).abs().max() <= 1e-40


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so_in_int8(bad: float) -> None:
    tensor = torch.zeros(2, 130)
    tensor[1, 70] = bad
    received = to_torch(to_wire(tensor, DType.INT8))
    assert torch.isfinite(received[0]).all()
    assert torch.isfinite(received[1, :64]).all()
    assert not torch.isfinite(received[1, 64:128]).any()


@pytest.mark.parametrize("scale", ["0000807f", "0000c07f"])
def test_a_scale_that_is_not_finite_makes_values_that_are_not(scale: str) -> None:
    data = bytes.fromhex(scale) + bytes(range(3))
    assert not torch.isfinite(to_torch(WireTensor(DType.INT8, (3,), data))[1:]).any()
