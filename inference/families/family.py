"""What the rest of ``inference`` asks of a model family.

Names of tensors are *canonical* here: as in the checkpoint, without the ``transformer.`` (or
``model.``) in front that some checkpoints have and others lack.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..attention import Plan
from ..model import Ends


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes of a model that don't depend on its family."""

    num_blocks: int
    hidden_size: int
    vocab_size: int
    cache_heads: int
    """Heads of keys and values."""
    head_dim: int
    max_length: int
    """Tokens that the model was trained for; it may run, and get worse, beyond."""


class Family(Protocol):
    """How to read a config, and to take blocks and ends out of transformers' own classes."""

    model_type: str
    """``config.model_type``, by which the family is found."""

    def parse_config(self, raw: dict[str, Any]) -> Any:
        """transformers' config object from ``config.json``. Raises ModelError in words."""

    def architecture(self, config: Any) -> dict[str, Any]:
        """The fields that change what the weights mean; part of the model's fingerprint."""

    def dimensions(self, config: Any) -> Dimensions:
        """The model's sizes."""

    def block_prefix(self, block: int) -> str:
        """What the canonical names of the tensors of ``block`` begin with."""

    def make_block(self, config: Any, block: int) -> nn.Module:
        """Build an empty block; called on the meta device.

        Its parameters are named as in the checkpoint, behind ``block_prefix``.
        """

    def run_block(self, module: nn.Module, hidden: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Run one block of ``make_block`` on ``[1, rows, hidden_size]``."""

    def make_ends(self, config: Any) -> Ends:
        """Build empty ends, parameters named canonically; called on the meta device."""

    def tied(self, config: Any) -> dict[str, str]:
        """Parameters of the ends that are others' twins, ``{name: twin}``, as the config has it.

        A checkpoint may hold a different tensor for ``name`` all the same; then that counts, as
        it does for transformers.
        """

    def alibi_slopes(self, config: Any) -> torch.Tensor | None:
        """fp32 ``[heads]`` on the CPU, or None for a family without ALiBi."""
