"""The demo model, with what makes its training fast: fused attention, growing depth, Muon."""

from __future__ import annotations

import functools
import math
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom import modeling_bloom

from .text import CONTEXT, VOCABULARY

DEPTHS = [(0.2, 2), (0.45, 4), (1.0, 8)]  # up to this share of the time, train so many blocks
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 4  # Keller Jordan's coefficients


@functools.cache
def causal_alibi(heads: int, length: int) -> torch.Tensor:
    """ALiBi with the causal mask in it, for every head: [1, heads, length, length]."""
    slopes = modeling_bloom._get_alibi_slopes(heads, torch.device("cpu"))
    alibi = (slopes[:, None, None] * torch.arange(length)).expand(-1, length, -1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return alibi.masked_fill(future, -math.inf)[None]


class FastAttention(modeling_bloom.BloomAttention):
    """BLOOM's attention through the fused kernel: the same function, faster, without a cache."""

    def forward(  # type: ignore[override]  # in training nothing else is given that matters
        self, hidden_states: torch.Tensor, residual: torch.Tensor, **_: object
    ) -> tuple[torch.Tensor, None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        mask = causal_alibi(self.num_heads, query.shape[2])
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.dense(context.transpose(1, 2).flatten(2)) + residual, None


def blocks_of(model: BloomForCausalLM) -> list[modeling_bloom.BloomBlock]:
    """The blocks in use."""
    return cast("list[modeling_bloom.BloomBlock]", list(model.transformer.h))


def set_fast(model: BloomForCausalLM) -> None:
    """Compute the same with faster operations."""
    for block in blocks_of(model):
        block.self_attention.__class__ = FastAttention
        block.mlp.gelu_impl = nn.GELU("tanh")  # type: ignore[assignment]


def new_model(seed: int) -> BloomForCausalLM:
    torch.manual_seed(seed)
    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        n_layer=8,
        n_head=8,
        seq_length=CONTEXT,  # type: ignore[call-arg]  # known to BLOOM's own checkpoints
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=True,
    )
    model = BloomForCausalLM(config)
    for block in blocks_of(model):  # every block begins as the identity
        nn.init.zeros_(block.self_attention.dense.weight)
        nn.init.zeros_(block.mlp.dense_4h_to_h.weight)
    return model


def grow(model: BloomForCausalLM, blocks: list[modeling_bloom.BloomBlock], done: float) -> None:
    """Use as many blocks as the time says, evenly spread.

    A block left out is one that still is the identity, so the model's output does not jump.
    """
    count = next(count for share, count in DEPTHS if done <= share)
    if len(model.transformer.h) != count:
        model.transformer.h = nn.ModuleList(blocks[:: len(blocks) // count])


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: torch.optim.Muon in float32, equal shapes in one batch.

    torch's own works in bfloat16, which is a hundred times slower on CPUs without support for it.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # it takes no closure
        group = self.param_groups[0]
        used = [p for p in group["params"] if p.grad is not None]
        for shape in sorted({p.shape for p in used}):
            stack = [p for p in used if p.shape == shape]
            update = orthogonalised(torch.stack([self.momentum(p, group) for p in stack]))
            rate = group["lr"] * 0.2 * math.sqrt(max(shape))  # a step as large as AdamW's
            for parameter, change in zip(stack, update, strict=True):
                parameter.mul_(1 - group["lr"] * group["decay"]).add_(change, alpha=-rate)

    def momentum(self, parameter: torch.Tensor, group: dict[str, float]) -> torch.Tensor:
        """Nesterov's."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "average" not in state:
            state["average"] = torch.zeros_like(gradient)
        state["average"].lerp_(gradient, 1 - group["momentum"])
        average: torch.Tensor = state["average"]
        return gradient.lerp(average, group["momentum"])


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest matrices with orthonormal rows or columns."""
    tall = matrices.shape[1] > matrices.shape[2]
    wide: torch.Tensor = matrices.mT if tall else matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = wide @ wide.mT
        wide = a * wide + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ wide
    return wide.mT if tall else wide
