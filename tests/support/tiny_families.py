"""Tiny random models of every family that we say we carry, with every switch of its config on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from support.tiny_bloom import pad_left
from transformers import AutoModelForCausalLM, PreTrainedConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
WINDOW = 6
ALTERNATING = ["full_attention", "sliding_attention"] * 2
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", GROUPED),
    "Llama, biases, tied, one head of keys, llama3 rotary": (
        "LlamaConfig",
        SIZES
        | {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
        },
    ),
    "Llama, wide heads, linear rotary": (
        "LlamaConfig",
        GROUPED | {"head_dim": 24, "rope_parameters": LINEAR},
    ),
    "Llama, dynamic rotary within its length": (
        "LlamaConfig",
        GROUPED | {"rope_parameters": DYNAMIC},
    ),
    "Llama, yarn": ("LlamaConfig", GROUPED | {"rope_parameters": YARN | {"attention_factor": 0.8}}),
    "Mistral, window": ("MistralConfig", GROUPED | {"sliding_window": WINDOW, "head_dim": 24}),
    "Mistral, no window": ("MistralConfig", GROUPED | {"sliding_window": None}),
    "Qwen2, window in half of the blocks, yarn": (
        "Qwen2Config",
        GROUPED
        | {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
            "rope_parameters": YARN,
        },
    ),
    "Qwen2, tied": ("Qwen2Config", GROUPED | {"tie_word_embeddings": True}),
    "Qwen3, wide heads, biases": (
        "Qwen3Config",
        GROUPED | {"head_dim": 24, "attention_bias": True},
    ),
    "Qwen3, window in half of the blocks, tied": (
        "Qwen3Config",
        GROUPED
        | {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-MoE, one dense block": (
        "Qwen3MoeConfig",
        GROUPED
        | {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "Qwen3-MoE, every second block dense, biases": (
        "Qwen3MoeConfig",
        GROUPED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "attention_bias": True,
        },
    ),
    "Phi3, window": ("Phi3Config", GROUPED | {"sliding_window": WINDOW}),
    "Phi3, longrope within its length, partial rotary": (
        "Phi3Config",
        GROUPED
        | {
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 64,
            "sliding_window": None,
        },
    ),
    "Granite, all multipliers": (
        "GraniteConfig",
        GROUPED
        | {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "Granite, biases, tied": (
        "GraniteConfig",
        GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "Olmo2": ("Olmo2Config", GROUPED),
    "Olmo2, biases, tied": (
        "Olmo2Config",
        GROUPED | {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "Gemma, wide heads": ("GemmaConfig", GROUPED | {"head_dim": 24}),
    "Gemma, one head of keys, biases, untied": (
        "GemmaConfig",
        SIZES
        | {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "Gemma2, soft caps, every second block with a window": (
        "Gemma2Config",
        GROUPED
        | {
            "head_dim": 24,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 20,
        },
    ),
    "Gemma2, no caps, biases, untied": (
        "Gemma2Config",
        GROUPED
        | {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "Mixtral, window": (
        "MixtralConfig",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "Mixtral, no window, tied": (
        "MixtralConfig",
        GROUPED
        | {
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
    ),
    "GPT-NeoX": ("GPTNeoXConfig", SIZES | {"rotary_pct": 0.25}),
    "GPT-NeoX, one after the other": (
        "GPTNeoXConfig",
        SIZES | {"use_parallel_residual": False, "attention_bias": False},
    ),
    "GPT-NeoX, all of a head rotated, linear rotary, tied": (
        "GPTNeoXConfig",
        SIZES
        | {
            "rotary_pct": 1.0,
            "rope_parameters": LINEAR | {"partial_rotary_factor": 1.0},
            "tie_word_embeddings": True,
        },
    ),
    "Cohere, norms of queries and keys": (
        "CohereConfig",
        GROUPED | {"logit_scale": 0.3, "use_qk_norm": True},
    ),
    "Cohere, biases, untied": (
        "CohereConfig",
        GROUPED | {"attention_bias": True, "tie_word_embeddings": False},
    ),
    "SmolLM3, blocks without rotary, window": (
        "SmolLM3Config",
        GROUPED
        | {
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
        },
    ),
    "SmolLM3, biases, untied": (
        "SmolLM3Config",
        GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "BLOOM": ("BloomConfig", {"vocab_size": 97, "hidden_size": 48, "n_layer": 4, "n_head": 6}),
    "BLOOM, residuals behind norms, untied": (
        "BloomConfig",
        {
            "vocab_size": 97,
            "hidden_size": 64,
            "n_layer": 4,
            "n_head": 4,
            "apply_residual_connection_post_layernorm": True,
            "tie_word_embeddings": False,
        },
    ),
    "Falcon, new architecture": (
        "FalconConfig",
        SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    ),
    "Falcon 2, one norm": (
        "FalconConfig",
        SIZES
        | {
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "alibi": False,
        },
    ),
    "Falcon, one head of keys": (
        "FalconConfig",
        SIZES | {"multi_query": True, "alibi": False, "parallel_attn": True},
    ),
    "Falcon, ALiBi, biases": (
        "FalconConfig",
        SIZES | {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    ),
    "Falcon, rotary one after the other, linear, untied": (
        "FalconConfig",
        SIZES
        | {
            "multi_query": False,
            "alibi": False,
            "parallel_attn": False,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": False,
        },
    ),
    "Falcon, new architecture, ALiBi": (
        "FalconConfig",
        SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": True},
    ),
    "Gemma3, windows": ("Gemma3TextConfig", GROUPED | {"head_dim": 24, "sliding_window": WINDOW}),
    "Cohere2, windows": ("Cohere2Config", GROUPED | {"sliding_window": WINDOW}),
    "Olmo, clipped": ("OlmoConfig", GROUPED | {"clip_qkv": 1.0}),
    "Olmo3, windows": ("Olmo3Config", GROUPED | {"sliding_window": WINDOW}),
    "OLMoE": ("OlmoeConfig", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "Granite-MoE": ("GraniteMoeConfig", GROUPED | {"num_local_experts": 4}),
    "Qwen2-MoE, a shared expert": (
        "Qwen2MoeConfig",
        GROUPED
        | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "Starcoder2": ("Starcoder2Config", GROUPED),
    "Phi": ("PhiConfig", GROUPED),
    "GLM": ("GlmConfig", GROUPED | {"head_dim": 16}),
    "GLM4": ("Glm4Config", GROUPED | {"head_dim": 16}),
    "Helium": ("HeliumConfig", GROUPED | {"head_dim": 16}),
    "EXAONE4, windows": ("Exaone4Config", GROUPED | {"sliding_window": WINDOW}),
    "Seed-OSS": ("SeedOssConfig", GROUPED | {"head_dim": 16}),
    "Arcee": ("ArceeConfig", GROUPED),
    "ERNIE 4.5": ("Ernie4_5Config", GROUPED),
    "HunYuan": ("HunYuanDenseV1Config", GROUPED | {"head_dim": 16}),
    "Persimmon": ("PersimmonConfig", SIZES),
    "BitNet": ("BitNetConfig", GROUPED),
}
"""A name to read, the class of the config, and its fields."""

NAMED = (
    "Llama, biases, tied, one head of keys, llama3 rotary",
    "Mistral, window",
    "Qwen2, window in half of the blocks, yarn",
    "Qwen3, wide heads, biases",
    "Qwen3-MoE, one dense block",
    "Phi3, window",
    "Granite, all multipliers",
    "Olmo2",
    "Gemma, wide heads",
    "Gemma2, soft caps, every second block with a window",
    "Mixtral, window",
    "GPT-NeoX",
    "Cohere, norms of queries and keys",
    "SmolLM3, blocks without rotary, window",
    "BLOOM",
    "Falcon, new architecture",
    "Falcon, ALiBi, biases",
)
"""A model of each family that the README names, with the most that its config can switch on."""


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The config called ``name`` in ``CONFIGS``."""
    kind, fields = CONFIGS[name]
    config: PreTrainedConfig = getattr(transformers, kind)(**(fields | changes))
    return config


def tiny_model(config: PreTrainedConfig, folder: Path, *, seed: int = 0, **options: Any) -> Any:
    """A random model of ``config`` in fp32, saved in ``folder`` and loaded from there."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:  # fresh biases are 0 and norms 1: a mix-up would go unseen
                parameter.add_(noise, alpha=0.1)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
        model.save_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """The new tokens of each prompt by ``generate``."""
    ids, mask = pad_left(prompts)
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return [row[ids.shape[1] :].tolist() for row in output]
