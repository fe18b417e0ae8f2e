"""What the rest of ``inference`` asks of a model family.

Names of tensors are *canonical* here: as in the checkpoint, without the base model's prefix (such
as ``transformer.`` or ``model.``) in front, which some checkpoints have and others lack.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..attention import Bias
from ..model import Ends, Start
from .conversion import Conversion


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
    """Tokens that the model was trained for; sessions are no longer than that."""


class Family(Protocol):
    """How to read a config, and to take blocks and ends out of transformers' own classes."""

    model_type: str
    """``config.model_type``, by which the family is found."""
    tried: bool
    """Whether each model must be tried against ``generate`` before it is served: whatever was not
    written for one architecture (``self_test.py``)."""

    def parse_config(self, raw: dict[str, Any], /) -> Any:
        """transformers' config object from ``config.json``. Raises ModelError in words."""

    def dimensions(self, config: Any, /) -> Dimensions:
        """The model's sizes."""

    def canonical(self, key: str, /) -> str:
        """The canonical name of a tensor that is called ``key`` in a checkpoint."""

    def conversion(self) -> Conversion:
        """How checkpoints name and lay out tensors that the modules have otherwise."""

    def block_prefix(self, config: Any, block: int, /) -> str:
        """What the canonical names of the tensors of ``block`` begin with."""

    def make_block(self, config: Any, block: int, /) -> nn.Module:
        """Build an empty block; called on the meta device.

        Its parameters are named canonically, behind ``block_prefix``.
        """

    def start(self, config: Any, device: torch.device, /) -> Start:
        """What runs the blocks of ``make_block``, once they are loaded onto ``device``."""

    def make_ends(self, config: Any, device: torch.device, /) -> Ends:
        """Build empty ends, their parameters on the meta device.

        Their parameters are named canonically, behind ``Ends.prefix``.
        """

    def tied(self, config: Any, /) -> dict[str, str]:
        """Parameters of the ends that are others' twins, ``{name: twin}``, as the config has it.

        A checkpoint may hold a different tensor for ``name`` all the same; then that counts, as
        it does for transformers.
        """

    def bias(self, config: Any, device: torch.device, /) -> Bias | None:
        """What is added to all scores, or None for a family without ALiBi."""
