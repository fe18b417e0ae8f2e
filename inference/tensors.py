"""Between torch tensors and the tensors of the wire.

Rule of this file: nothing is copied that need not be. A received buffer is viewed where it lies;
a tensor that is contiguous, on the CPU and of the right dtype is sent from its own memory.
"""

import numpy
import torch
from torch.utils.dlpack import from_dlpack

from ..protocol.tensor import DType, WireTensor

_TORCH = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
}
_WIRE = {torch_dtype: wire for wire, torch_dtype in _TORCH.items()}


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of a wire dtype."""
    return _TORCH[dtype]


def wire_dtype(dtype: torch.dtype) -> DType:
    """The wire dtype of a torch dtype. Raises ValueError for one that never travels."""
    try:
        return _WIRE[dtype]
    except KeyError:
        raise ValueError(
            f"{dtype} does not travel; convert to one of {', '.join(DType)} first"
        ) from None


def to_torch(
    wire: WireTensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The tensor in ``wire``, of its shape, in ``dtype`` (default: as it came) on ``device``.

    Without a conversion this is a view of ``wire.data``, which stays alive as long as the tensor:
    treat it as read-only.
    """
    # numpy has no bfloat16, and torch.frombuffer warns about read-only memory: go through bytes
    # and DLPack, which knows read-only buffers.
    raw = from_dlpack(numpy.frombuffer(wire.data, dtype=numpy.uint8))
    tensor = raw.view(_TORCH[wire.dtype]).view(wire.shape)
    return tensor.to(device=device, dtype=dtype or tensor.dtype)


def to_wire(tensor: torch.Tensor, dtype: DType | None = None) -> WireTensor:
    """``tensor`` as bytes in ``dtype`` (default: its own); a view of its memory where it can be.

    The tensor must not be changed until the bytes are sent.
    """
    target = wire_dtype(tensor.dtype) if dtype is None else dtype
    own = tensor.detach().to(device="cpu", dtype=_TORCH[target]).contiguous()
    data = own.view(-1).view(torch.uint8).numpy().data
    return WireTensor(dtype=target, shape=tuple(own.shape), data=data)
