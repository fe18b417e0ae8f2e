import pytest
from petals.protocol.errors import RemoteProtocolError
from petals.protocol.tensor import DType, WireTensor


@pytest.mark.parametrize(
    ("dtype", "size"), [(DType.FLOAT32, 4), (DType.BFLOAT16, 2), (DType.FLOAT16, 2)]
)
def test_a_tensor_has_as_many_bytes_as_its_shape_says(dtype: DType, size: int) -> None:
    assert dtype.size == size
    data = bytes(2 * 3 * size)
    assert WireTensor(dtype, (2, 3), memoryview(data)).data == data
    with pytest.raises(RemoteProtocolError, match=rf"takes {len(data)} bytes"):
        WireTensor(dtype, (2, 3), data[:-1])


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 1)])
def test_a_tensor_has_one_to_four_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(RemoteProtocolError, match="1 to 4 dimensions"):
        WireTensor(DType.FLOAT32, shape, bytes(4))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (-1, -1)])
def test_no_dimension_is_empty(shape: tuple[int, ...]) -> None:
    with pytest.raises(RemoteProtocolError, match="no empty dimension"):
        WireTensor(DType.FLOAT32, shape, b"")
