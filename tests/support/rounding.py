"""Rounding to NF4 in torch's words: what the compiled one has to give."""

import torch
from petals.inference.quantizing import NF4_GROUP, Nf4Weights, nf4_between


def nearest_nf4(weight: torch.Tensor) -> Nf4Weights:
    """``weight`` ``[out, in]`` of any floating dtype."""
    out_features, in_features = weight.shape
    groups = torch.nn.functional.pad(weight.float(), (0, -in_features % NF4_GROUP))
    groups = groups.view(out_features, -1, NF4_GROUP)
    scales = groups.abs().amax(dim=2).clamp_(min=torch.finfo(torch.float32).tiny)
    codes = torch.bucketize(groups / scales[:, :, None], nf4_between(), out_int32=True)
    return Nf4Weights(codes.to(torch.uint8).view(out_features, -1)[:, :in_features], scales)
