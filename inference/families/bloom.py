"""BLOOM: fused query-key-value, ALiBi, a layer norm behind the embedding, mostly a tied head.

The forward pass is transformers' ``BloomBlock``, with two things changed: attention is ragged, and
activation (the tanh approximation of GELU, the same function as ``BloomGelu``) and residuals are left
to the linear modules, which have their results at hand. Tensor-parallel slices (``pretraining_tp``
with ``slow_but_exact``) are summed in one matrix product, which is what they mean.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import BloomConfig
from transformers.models.bloom import modeling_bloom

from ...protocol.errors import ModelError
from ..attention import AlibiBias, Plan, fused_attention, ragged_attention
from ..linear import Linear
from ..model import Ends, RunBlock, Start
from .family import Dimensions
from .own_attention import OwnAttention

Norm = Callable[[torch.Tensor], torch.Tensor]

_DEFAULT_LENGTH = 2048
"""BLOOM's own; configs of its smaller siblings often don't say."""


class RaggedBloomAttention(modeling_bloom.BloomAttention):
    """BLOOM's attention over the rows of many sessions; ``layer_past`` is the ``Plan``."""

    def forward(  # type: ignore[override]  # the arguments that BloomBlock passes, fewer used
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        *,
        layer_past: Plan,
        **_unused: object,
    ) -> tuple[torch.Tensor, None]:
        """``[1, rows, hidden]`` twice to ``[1, rows, hidden]``."""
        assert self.layer_idx is not None
        plan, block, scale = layer_past, self.layer_idx, self.inv_norm_factor
        fused = self.query_key_value(hidden_states)
        attended = fused_attention(fused, heads=self.num_heads, plan=plan, block=block, scale=scale)
        if attended is None:
            query, key, value = self._reshape(fused)
            attended = ragged_attention(query, key, value, plan=plan, block=block, scale=scale)
        return _linear(self.dense).added_to(residual, attended), None


class FusedBloomMLP(modeling_bloom.BloomMLP):
    """BLOOM's MLP with its activation and its residual left to the linear modules."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """``[1, rows, hidden]`` twice to ``[1, rows, hidden]``."""
        activated = _linear(self.dense_h_to_4h).gelu(hidden_states)
        return _linear(self.dense_4h_to_h).added_to(residual, activated)


def _find_parts_at_once(block: nn.Module) -> None:
    """Let a block that was loaded find its parts among its own attributes.

    torch looks for a module's parts where all else has failed, and calls them through two layers of hooks:
    a sixth of what Python does between the products of a block.
    """
    for module in block.modules():
        for name, part in module.named_children():
            if isinstance(part, nn.LayerNorm):
                vars(module)[name] = _layer_norm(part)
            else:
                called = module is block or name == "query_key_value"
                vars(module)[name] = part.forward if called else part


def _layer_norm(module: nn.LayerNorm) -> Norm:
    """What the module does in the end."""
    shape, epsilon = module.normalized_shape, module.eps
    weight, bias = module.weight, module.bias
    return lambda x: torch.layer_norm(x, shape, weight, bias, epsilon)


def _linear(module: nn.Module) -> Linear:
    """What loading has put where the block had ``nn.Linear``."""
    assert isinstance(module, Linear)
    return module


class BloomEnds(Ends):
    """Word embeddings and their layer norm; final layer norm and head."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        epsilon = config.layer_norm_epsilon
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_embeddings_layernorm = nn.LayerNorm(config.hidden_size, eps=epsilon)
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @functools.cached_property
    def _norm_embeddings(self) -> Norm:
        return _layer_norm(self.word_embeddings_layernorm)

    @functools.cached_property
    def _norm_hidden(self) -> Norm:
        return _layer_norm(self.ln_f)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._enter(self.word_embeddings(token_ids))

    def _enter(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self._norm_embeddings(embeddings)

    def _final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._norm_hidden(hidden)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(self._final_norm(hidden))
        return logits


class Bloom(OwnAttention):
    """The BLOOM family: every ``BloomForCausalLM`` or ``BloomModel`` checkpoint."""

    model_type = "bloom"

    def parse_config(self, raw: dict[str, Any]) -> BloomConfig:
        """See ``Family``."""
        try:
            config = BloomConfig.from_dict(raw | {"pretraining_tp": 1, "slow_but_exact": False})
        # The config's own validation raises its library's errors, of several unrelated classes.
        except Exception as error:
            raise ModelError(f"config.json is not a valid BLOOM config: {error}") from error
        for name in ("vocab_size", "hidden_size", "n_layer", "n_head"):
            if getattr(config, name) < 1:
                raise ModelError(f"config.json: {name} must be positive")
        if config.hidden_size % config.n_head:
            raise ModelError(
                f"config.json: hidden_size {config.hidden_size} is not divisible by "
                f"n_head {config.n_head}"
            )
        return config

    def dimensions(self, config: BloomConfig) -> Dimensions:
        """See ``Family``."""
        length = getattr(config, "seq_length", None)
        return Dimensions(
            num_blocks=config.n_layer,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            cache_heads=config.n_head,
            head_dim=config.hidden_size // config.n_head,
            max_length=length if isinstance(length, int) and length > 0 else _DEFAULT_LENGTH,
        )

    def make_block(self, config: BloomConfig, block: int) -> nn.Module:
        """See ``Family``."""
        module = modeling_bloom.BloomBlock(config, layer_idx=block)
        module.self_attention = RaggedBloomAttention(config, layer_idx=block)
        module.mlp = FusedBloomMLP(config)
        return module

    def start(self, _config: BloomConfig, _device: torch.device) -> Start:
        """See ``Family``."""

        def start(_hidden: torch.Tensor, plan: Plan) -> RunBlock:
            def run(_block: int, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
                output: torch.Tensor
                if "mlp" not in vars(module):
                    _find_parts_at_once(module)
                # Not its __call__: two layers of hooks that nobody has set.
                output, _ = module.forward(hidden, alibi=None, attention_mask=None, layer_past=plan)
                return output

            return run

        return start

    def make_ends(self, config: BloomConfig, _device: torch.device) -> Ends:
        """See ``Family``."""
        with torch.device("meta"):
            return BloomEnds(config)

    def bias(self, config: BloomConfig, device: torch.device) -> AlibiBias:
        """See ``Family``."""
        mask = torch.ones((1, 2))
        # At position 1 the bias is the slope itself.
        alibi = modeling_bloom.build_alibi_tensor(mask, config.n_head, torch.float32)
        return AlibiBias(alibi[:, 0, 1].clone().to(device))
