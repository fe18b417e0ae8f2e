"""The experts of a mixture, each matrix held and computed as every other linear is.

transformers keeps the experts of a block in two parameters of three dimensions, which no kernel of
ours reads. Here each expert is two linears, and a round visits those that its rows were sent to.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

Gate = Callable[[torch.Tensor], torch.Tensor]
"""What is between the two matrices of an expert, ``[rows, 2 * inner]`` to ``[rows, inner]``."""


class Experts(nn.Module):
    """``experts`` of transformers' mixtures, for the rows of a round."""

    def __init__(self, up: Sequence[nn.Module], down: Sequence[nn.Module], gate: Gate) -> None:
        super().__init__()
        self._up = nn.ModuleList(up)
        self._down = nn.ModuleList(down)
        self._gate = gate

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Rows ``[rows, hidden]`` through the experts ``[rows, k]`` that each was sent to."""
        output = torch.zeros_like(hidden_states)
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=len(self._up)).tolist()
        sent = zip(self._up, self._down, order.split(counts), strict=True)
        for up, down, places in sent:
            if len(places):
                rows = places // top_k_index.shape[1]
                own = down(self._gate(up(hidden_states[rows])))
                own = own * top_k_weights.reshape(-1)[places, None]
                output.index_add_(0, rows, own.to(output.dtype))
        return output
