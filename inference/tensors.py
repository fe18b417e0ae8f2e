"""Between torch tensors and the tensors of the wire.

Rule of this file: nothing is copied that need not be. A received buffer is viewed where it lies;
a tensor that is contiguous, on the CPU and of the right dtype is sent from its own memory. A
conversion (another dtype, int8 in blocks) makes one new tensor of the target's size.
"""

import ctypes
import math

import numpy
import torch
from torch.utils.dlpack import from_dlpack

from ..protocol.tensor import DType, WireTensor
from . import wire_int8

_PLAIN = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
}
_SMALL = 64 * 1024
"""Bytes that are copied in less time than it takes to view them where they lie."""
_WIRE = {torch_dtype: wire for wire, torch_dtype in _PLAIN.items()}


def torch_dtype(dtype: DType) -> torch.dtype:
    """What ``to_torch`` gives for a wire dtype: its own dtype, and float32 for int8 in blocks."""
    return _PLAIN.get(dtype, torch.float32)


def wire_dtype(dtype: torch.dtype) -> DType:
    """The wire dtype that keeps a torch dtype as it is. Raises ValueError if there is none."""
    try:
        return _WIRE[dtype]
    except KeyError:
        raise ValueError(
            f"{dtype} does not travel; convert to one of {', '.join(_PLAIN)} first"
        ) from None


def to_torch(
    wire: WireTensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The tensor in ``wire``, of its shape, in ``dtype`` (default: ``torch_dtype``) on ``device``.

    Without a conversion this is a view of ``wire.data``, unless that is small, which stays alive as
    long as the tensor: treat it as read-only. Where a scale of an int8 tensor is not finite, neither
    are its values.
    """
    if wire.dtype is not DType.INT8 and len(wire.data) <= _SMALL:
        tensor = torch.frombuffer(bytearray(wire.data), dtype=_PLAIN[wire.dtype]).view(wire.shape)
        if dtype in (None, tensor.dtype) and str(device) == "cpu":
            return tensor
        return tensor.to(device=device, dtype=dtype or tensor.dtype)
    # numpy has no bfloat16, and torch.frombuffer warns about read-only memory: go through bytes
    # and DLPack, which knows read-only buffers.
    raw = from_dlpack(numpy.frombuffer(wire.data, dtype=numpy.uint8))
    if wire.dtype is DType.INT8:
        tensor = wire_int8.unpack(raw, wire.shape)
    else:
        tensor = raw.view(_PLAIN[wire.dtype]).view(wire.shape)
    return tensor.to(device=device, dtype=dtype or tensor.dtype)


def to_wire(tensor: torch.Tensor, dtype: DType | None = None) -> WireTensor:
    """``tensor`` as bytes in ``dtype`` (default: its own); a view of its memory where it can be.

    The tensor must not be changed until the bytes are sent. NaN and infinity stay what they are,
    in int8 over the whole block of values that they are in: whoever receives them can tell.
    """
    target = wire_dtype(tensor.dtype) if dtype is None else dtype
    if target is DType.INT8:
        own = wire_int8.pack(tensor.detach())
    else:
        own = tensor.detach().to(device="cpu", dtype=_PLAIN[target]).contiguous()
    data = own.view(-1).view(torch.uint8).numpy().data
    return WireTensor(dtype=target, shape=tuple(tensor.shape), data=data)


def to_bytes(tensor: torch.Tensor, dtype: DType) -> bytes:
    """A copy of what ``to_wire`` gives: of a row or two it takes less time than a view."""
    if _PLAIN.get(dtype) is tensor.dtype and tensor.device.type == "cpu" and tensor.is_contiguous():
        return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
    return bytes(to_wire(tensor, dtype).data)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: both spread into a sum, which is one cheap pass."""
    if math.isfinite(tensor.sum(dtype=torch.float32).item()):
        return True
    return bool(torch.isfinite(tensor).all())
