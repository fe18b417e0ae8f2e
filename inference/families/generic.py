"""Every decoder-only family whose attention goes through transformers' attention interface.

The forward pass is transformers' own decoder layers; their attention asks the interface for a
function by name, and is given ours (``ragged_attention``), together with the plan, through the
keyword arguments that layers hand on. Window, scale and soft cap come as the function's arguments.
What a layer needs besides is what the model's own forward pass calls it with (``skeleton.py``).

That holds for nearly all families, and for those where it doesn't nothing here knows it: whether a
model comes out right is found by trying it (``self_test.py``), never taken for granted.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from ...protocol.errors import ModelError
from ..attention import Bias, Plan, ragged_attention
from ..model import Ends, Start
from .conversion import Conversion
from .family import Dimensions
from .skeleton import ATTENTION, SkeletonEnds, Starter, blocks_of, build_model, fill_buffers

_POSITIVE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_DEFAULT_LENGTH = 2048


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: object,
    *,
    plan: Plan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: ``[1, heads, rows, head_dim]``, and back behind rows."""
    if plan is None:
        raise ModelError("its layers drop the arguments that attention needs to batch sessions")
    attended = ragged_attention(
        query,
        key,
        value,
        plan=plan,
        block=module.layer_idx,  # type: ignore[arg-type]  # torch declares Tensor | Module
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return attended.view(1, query.shape[2], query.shape[1], query.shape[3]), None


AttentionInterface.register(ATTENTION, _attention)


class Generic:
    """One model type on the attention interface."""

    tried = True

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type
        self._built: tuple[PreTrainedConfig, PreTrainedModel] | None = None

    @staticmethod
    def knows(model_type: str) -> bool:
        """Whether transformers has a causal language model of that type."""
        return (
            model_type in CONFIG_MAPPING
            and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING
        )

    def parse_config(self, raw: dict[str, Any]) -> PreTrainedConfig:
        """See ``Family``."""
        try:
            config = CONFIG_MAPPING[self.model_type].from_dict(raw)
        # The config's own validation raises its library's errors, of several unrelated classes.
        except Exception as error:
            raise ModelError(
                f"config.json is not a valid {self.model_type} config: {error}"
            ) from error
        for name in _POSITIVE:
            value = getattr(config, name, None)
            if not isinstance(value, int) or value < 1:
                raise ModelError(f"config.json: {name} must be a positive number")
        # Of use in training only, and a pass through taps has none to give.
        for name in ("output_router_logits", "output_hidden_states", "output_attentions"):
            if getattr(config, name, False):
                setattr(config, name, False)
        config._attn_implementation = ATTENTION
        return config

    def dimensions(self, config: PreTrainedConfig) -> Dimensions:
        """See ``Family``."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        length = getattr(config, "max_position_embeddings", None) or _DEFAULT_LENGTH
        return Dimensions(
            num_blocks=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            cache_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            max_length=min(length, _rotary_limit(config) or length),
        )

    def canonical(self, key: str) -> str:
        """See ``Family``."""
        return key.removeprefix(f"{self._class.base_model_prefix}.")

    def conversion(self) -> Conversion:
        """See ``Family``."""
        return Conversion(self.model_type, self._class.__name__)

    def block_prefix(self, config: PreTrainedConfig, block: int) -> str:
        """See ``Family``."""
        name, _ = blocks_of(self._model(config))
        return f"{name}.{block}."

    def make_block(self, config: PreTrainedConfig, block: int) -> nn.Module:
        """See ``Family``."""
        model = self._model(config)
        _, blocks = blocks_of(model)
        module: nn.Module = type(blocks[block])(config, block)
        fill_buffers(model, module, torch.device("cpu"))
        return module

    def start(self, config: PreTrainedConfig, device: torch.device) -> Start:
        """See ``Family``."""
        return Starter(build_model(config), device, _rotary_limit(config))

    def make_ends(self, config: PreTrainedConfig, device: torch.device) -> Ends:
        """See ``Family``."""
        return SkeletonEnds(build_model(config), device)

    def tied(self, config: PreTrainedConfig) -> dict[str, str]:
        """See ``Family``."""
        if not config.tie_word_embeddings:
            return {}
        twins = self._class._tied_weights_keys or {}
        return {self.canonical(name): self.canonical(twin) for name, twin in twins.items()}

    def bias(self, _config: PreTrainedConfig, _device: torch.device) -> Bias | None:
        """See ``Family``."""
        return None

    @property
    def _class(self) -> type[PreTrainedModel]:
        found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[self.model_type]]
        return found  # type: ignore[no-any-return]

    def _model(self, config: PreTrainedConfig) -> PreTrainedModel:
        """An empty model of ``config``, for the classes of its blocks; kept for the next block."""
        if self._built is None or self._built[0] is not config:
            self._built = config, build_model(copy.deepcopy(config))
        return self._built[1]


def _rotary_limit(config: PreTrainedConfig) -> int | None:
    """Tokens from which on the rotary embedding of earlier ones would change; None if it doesn't.

    ``dynamic`` scaling follows the length of the text, and ``longrope`` changes over at one length.
    A hop can't rotate again what it has cached, and a prefix computed anew would be another.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = []
    for one in (parameters, *parameters.values()):
        if not isinstance(one, dict):
            continue
        kind = one.get("rope_type", "")
        if kind == "longrope":
            limits.append(one["original_max_position_embeddings"])
        elif "dynamic" in kind:
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)
