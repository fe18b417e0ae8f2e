"""Values in 8 bits, in blocks of 64 with a scale each, as they travel (``protocol/tensor.py``).

On the CPU by our own code where a model has been loaded with it; torch's takes several passes, and
several times as long. Either may be called on the event loop: ours uses the one thread that calls it.
"""

import torch

from ..protocol.tensor import BLOCK_VALUES, SCALE_BYTES, DType, scales_of
from .native import native_at_hand
from .packed import FLOATS


def pack(tensor: torch.Tensor) -> torch.Tensor:
    """Floating values ``[..., width]`` as uint8 ``[rows, bytes of a row]`` on the CPU."""
    width = tensor.shape[-1]
    values = tensor.reshape(-1, width)
    library = native_at_hand() if tensor.device.type == "cpu" else None
    if library is None:
        return pack_by_torch(values)
    if values.dtype not in FLOATS:
        values = values.float()
    packed = torch.empty((len(values), DType.INT8.row_bytes(width)), dtype=torch.uint8)
    library.pack_wire(values, packed)
    return packed


def unpack(raw: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """What ``pack`` made, uint8 on the CPU, as float32 of ``shape``."""
    library = native_at_hand()
    if library is None:
        return unpack_by_torch(raw, shape)
    values = torch.empty(shape)
    library.unpack_wire(raw, values)
    return values


def pack_by_torch(values: torch.Tensor) -> torch.Tensor:
    """``pack`` of ``[rows, width]`` on any device."""
    rows, width = values.shape
    count = scales_of(width)
    values = torch.nn.functional.pad(values.float(), (0, count * BLOCK_VALUES - width))
    blocks = values.view(rows, count, BLOCK_VALUES)
    # A magnitude of inf must not become a quotient that is finite: inf / 127 is inf, as NaN is NaN.
    scales = blocks.abs().amax(dim=2) / 127
    steps = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, :, None]
    quantised = steps.round_().clamp_(-127, 127).to(torch.int8).view(rows, -1)[:, :width]
    packed = torch.cat([scales.view(torch.uint8), quantised.view(torch.uint8)], dim=1)
    return packed.cpu()


def unpack_by_torch(raw: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``unpack``."""
    width = shape[-1]
    count = scales_of(width)
    packed = raw.view(-1, DType.INT8.row_bytes(width))
    scales = packed[:, : SCALE_BYTES * count].reshape(-1).view(torch.float32).view(-1, count)
    values = packed[:, SCALE_BYTES * count :].view(torch.int8)
    values = torch.nn.functional.pad(values, (0, count * BLOCK_VALUES - width))
    blocks = values.view(len(packed), count, BLOCK_VALUES) * scales[:, :, None]
    return blocks.view(len(packed), -1)[:, :width].reshape(shape)
