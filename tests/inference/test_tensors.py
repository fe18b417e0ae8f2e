"""Tensors come back as they were sent, without a copy where none is needed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from petals.inference.tensors import to_torch, to_wire, torch_dtype, wire_dtype
from petals.protocol.tensor import DType, WireTensor


@given(
    dtype=st.sampled_from(list(DType)),
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


def test_no_copies() -> None:
    tensor = torch.randn(3, 4)
    tensor.view(-1)[0] = 5
    wire = to_wire(tensor)
    tensor.view(-1)[0] = 7
    assert to_torch(wire)[0, 0] == 7
    frame = bytearray(8)
    received = to_torch(WireTensor(DType.FLOAT32, (2,), memoryview(frame)))
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
