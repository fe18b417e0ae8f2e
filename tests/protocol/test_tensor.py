import pytest
from petals.protocol.errors import RemoteProtocolError
from petals.protocol.tensor import DType, WireTensor


@pytest.mark.parametrize(
    ("dtype", "width", "size"),
    [
        (DType.FLOAT32, 3, 12),
        (DType.BFLOAT16, 3, 6),
        (DType.FLOAT16, 3, 6),
        (DType.INT8, 1, 4 + 1),
        (DType.INT8, 64, 4 + 64),
        (DType.INT8, 65, 8 + 65),
    ],
)
def test_a_tensor_has_as_many_bytes_as_its_shape_says(dtype: DType, width: int, size: int) -> None:
    assert dtype.row_bytes(width) == size
    data = bytes(2 * size)
    assert WireTensor(dtype, (2, width), memoryview(data)).data == data
    with pytest.raises(RemoteProtocolError, match=rf"takes {len(data)} bytes"):
        WireTensor(dtype, (2, width), data[:-1])


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 1)])
def test_a_tensor_has_one_to_four_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(RemoteProtocolError, match="1 to 4 dimensions"):
        WireTensor(DType.FLOAT32, shape, bytes(4))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (-1, -1)])
def test_no_dimension_is_empty(shape: tuple[int, ...]) -> None:
    with pytest.raises(RemoteProtocolError, match="no empty dimension"):
        WireTensor(DType.FLOAT32, shape, b"")
