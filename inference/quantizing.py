"""Weights in 8 and in 4 bits, as our own kernels and the libraries' have them.

Rounding is to the nearest; scales are float32. What a matrix is packed into for a processor is not
known here.
"""

from dataclasses import dataclass

import torch

NF4_GROUP = 64
"""Weights of a row that share a scale, as in bitsandbytes."""
NF4_LEVELS = (
    -1.0, -0.6961928009, -0.5250730515, -0.3949174881, -0.2844413817, -0.1847734302, -0.0910500362, 0.0,
    0.0795802996, 0.1609302014, 0.2461123019, 0.3379152417, 0.4407098293, 0.5626170039, 0.7229568362, 1.0,
)  # fmt: skip
"""The quantiles of a normal distribution: Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E."""
_TINY = torch.finfo(torch.float32).tiny


def nf4_between() -> torch.Tensor:
    """``[15]``, float32: what is above such a number is nearer to the next level."""
    levels = torch.tensor(NF4_LEVELS)
    return (levels[1:] + levels[:-1]) / 2


@dataclass(frozen=True)
class Int8Weights:
    """``integers * scales[:, None]``."""

    integers: torch.Tensor
    """``[out, in]``, int8, from -127 to 127."""
    scales: torch.Tensor
    """``[out]``, float32."""

    @classmethod
    def nearest(cls, weight: torch.Tensor) -> "Int8Weights":
        """``weight`` ``[out, in]`` of any floating dtype."""
        weight = weight.float()
        scales = (weight.abs().amax(dim=1) / 127).clamp_(min=_TINY)
        return cls((weight / scales[:, None]).round_().to(torch.int8), scales)


@dataclass(frozen=True)
class Nf4Weights:
    """``NF4_LEVELS[codes]``, times the scale of their row and group."""

    codes: torch.Tensor
    """``[out, in]``, uint8, from 0 to 15."""
    scales: torch.Tensor
    """``[out, in / group]``, made up to a whole group; float32."""
    group: int = NF4_GROUP
