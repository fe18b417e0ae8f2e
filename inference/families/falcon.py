"""Falcon: fused query-key-value in three layouts, rotary embeddings or ALiBi, a tied head.

The forward pass is transformers' ``FalconDecoderLayer`` with its attention made ragged, and with
``nn.Linear`` in place of ``FalconLinear``, which computes the same. Heads of keys are cached once
and not repeated for every head of queries.

Its ALiBi (the RW models) is rounded to bfloat16 at every position, as the models were trained:
unlike BLOOM's it can't be taken relative to the newest token.
"""

from typing import Any

import torch
from torch import nn
from transformers import FalconConfig
from transformers.models.falcon import modeling_falcon

from ...protocol.errors import ModelError
from ..attention import Bias, Plan, ragged_attention
from ..model import Ends, RunBlock, Start
from .family import Dimensions
from .own_attention import OwnAttention

_DEFAULT_LENGTH = 2048


class RaggedFalconAttention(modeling_falcon.FalconAttention):
    """Falcon's attention over the rows of many sessions; ``layer_past`` is the ``Plan``."""

    def forward(  # type: ignore[override]  # the arguments that the layer passes, fewer used
        self,
        hidden_states: torch.Tensor,
        *,
        layer_past: Plan,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        **_unused: object,
    ) -> tuple[torch.Tensor, None]:
        """``[1, rows, hidden]`` to the same."""
        assert self.layer_idx is not None
        query, key, value = (
            part.transpose(1, 2) for part in self._split(self.query_key_value(hidden_states))
        )
        if position_embeddings is not None:
            query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        attended = ragged_attention(
            query, key, value, plan=layer_past, block=self.layer_idx, scale=self.inv_norm_factor
        )
        return self.dense(attended), None

    def _split(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[1, rows, heads, head_dim]``, keys and values with heads of their own."""
        if not self.new_decoder_architecture:
            query, key, value = self._split_heads(fused)
            return query, key, value
        _, rows, _ = fused.shape
        assert self.num_kv_heads is not None
        group = self.num_heads // self.num_kv_heads
        by_head = fused.view(1, rows, self.num_kv_heads, group + 2, self.head_dim)
        return by_head[..., :-2, :].flatten(2, 3), by_head[..., -2, :], by_head[..., -1, :]


class RoundedAlibi:
    """The ALiBi bias by position, in the steps of bfloat16, scaled as the scores are."""

    def __init__(self, heads: int, scale: float, device: torch.device) -> None:
        self._heads = heads
        self._scale = scale
        self.slopes = None
        self._table = torch.zeros((heads, 1, 0), device=device)

    def last(self, length: int) -> torch.Tensor:
        """See ``Bias``."""
        capacity = self._table.shape[2]
        if length > capacity:
            mask = torch.ones((1, max(length, 2 * capacity, 256)), dtype=torch.int64)
            table = modeling_falcon.build_alibi_tensor(mask, self._heads, torch.float32)
            self._table = table.to(self._table.device) * self._scale
        return self._table[:, :, :length]


class FalconEnds(Ends):
    """Word embeddings; final layer norm and head."""

    def __init__(self, config: FalconConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        epsilon: Any = config.layer_norm_epsilon
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.word_embeddings(token_ids)
        return embedded

    def _enter(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings

    def _final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.ln_f(hidden)
        return normed

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(self._final_norm(hidden))
        return logits


class Falcon(OwnAttention):
    """The Falcon family: 7B, 40B, 180B, RW, and Falcon 2; Falcon 3 are Llamas."""

    model_type = "falcon"

    def parse_config(self, raw: dict[str, Any]) -> FalconConfig:
        """See ``Family``."""
        try:
            config = FalconConfig.from_dict(raw)
        # The config's own validation raises its library's errors, of several unrelated classes.
        except Exception as error:
            raise ModelError(f"config.json is not a valid Falcon config: {error}") from error
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(config, name) < 1:
                raise ModelError(f"config.json: {name} must be positive")
        if config.hidden_size % config.num_attention_heads:
            raise ModelError(
                f"config.json: hidden_size {config.hidden_size} is not divisible by "
                f"num_attention_heads {config.num_attention_heads}"
            )
        rotary: dict[str, Any] = dict(config.rope_parameters or {})
        if not config.alibi and rotary.get("rope_type") == "dynamic":
            raise ModelError("config.json: dynamic rotary scaling is not supported for Falcon")
        if config.num_ln_in_parallel_attn is None and config.new_decoder_architecture:
            config.num_ln_in_parallel_attn = 2  # as its layers set it when they are made
        config._attn_implementation = "eager"  # it chooses a class, which is replaced by ours
        return config

    def dimensions(self, config: FalconConfig) -> Dimensions:
        """See ``Family``."""
        cache_heads = config.num_attention_heads
        if config.new_decoder_architecture:
            cache_heads = config.num_kv_heads or cache_heads
        elif config.multi_query:
            cache_heads = 1
        return Dimensions(
            num_blocks=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            cache_heads=cache_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            max_length=config.max_position_embeddings or _DEFAULT_LENGTH,
        )

    def make_block(self, config: FalconConfig, block: int) -> nn.Module:
        """See ``Family``."""
        module = modeling_falcon.FalconDecoderLayer(config, layer_idx=block)
        module.self_attention = RaggedFalconAttention(config, layer_idx=block)
        for part in list(module.modules()):
            for name, child in part.named_children():
                if isinstance(child, modeling_falcon.FalconLinear):
                    sizes = child.in_features, child.out_features
                    setattr(part, name, nn.Linear(*sizes, bias=child.bias is not None))
        return module

    def start(self, config: FalconConfig, device: torch.device) -> Start:
        """See ``Family``."""
        with torch.device(device):
            rotary = None if config.alibi else modeling_falcon.FalconRotaryEmbedding(config)

        def start(hidden: torch.Tensor, plan: Plan) -> RunBlock:
            rotated = None if rotary is None else rotary(hidden, plan.positions(device))

            def run(_block: int, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
                output: torch.Tensor
                output, _ = module(
                    hidden,
                    alibi=None,
                    attention_mask=None,
                    layer_past=plan,
                    position_embeddings=rotated,
                )
                return output

            return run

        return start

    def make_ends(self, config: FalconConfig, _device: torch.device) -> Ends:
        """See ``Family``."""
        with torch.device("meta"):
            return FalconEnds(config)

    def bias(self, config: FalconConfig, device: torch.device) -> Bias | None:
        """See ``Family``."""
        if not config.alibi:
            return None
        scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        return RoundedAlibi(config.num_attention_heads, scale, device)
