"""The one module that stands where transformers' layers have ``nn.Linear``.

This is the point at which a kernel is chosen by device, dtype and quantisation; the layers around
it never know.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Linear(nn.Module):
    """``x @ weight.T + bias`` with ``weight`` ``[out, in]``, on ``x`` ``[..., in]``."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, in the dtype of the weight."""
        return F.linear(x, self.weight, self.bias)


def swap_linears(module: nn.Module) -> None:
    """Put a ``Linear`` with the same parameters in place of every ``nn.Linear`` below ``module``.

    Only exact ``nn.Linear``: a subclass computes something else and is left alone.
    """
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, Linear(child.weight, child.bias))
        else:
            swap_linears(child)
