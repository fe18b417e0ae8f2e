"""A tiny config of the same architecture as a large one: every switch kept, every size small.

Sizes that other fields depend on, such as the dimension of a head (rotary factors come one for each
pair of it), are kept too. Windows become so short that a text of a dozen tokens leaves them.
"""

from collections.abc import Mapping
from typing import Any

from ...protocol.errors import ModelError

WINDOW = 5
"""Tokens of a sliding window."""
VOCABULARY = 128
_INNER = 96
_LEAST_BLOCKS, _MOST_BLOCKS = 3, 12
_NEEDED = ("num_hidden_layers", "num_attention_heads", "hidden_size")
_WINDOWS = ("sliding_window", "attention_chunk_size")
_AT_MOST = {
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "decoder_sparse_step": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a tiny model, from those of a transformers config (``to_dict``).

    Raises ModelError for a config that has other names for its sizes.
    """
    unknown = [name for name in _NEEDED if not isinstance(config.get(name), int)]
    if unknown:
        raise ModelError(f"its config has no {unknown[0]}")
    blocks = config["num_hidden_layers"]
    few = _enough(config, blocks)
    heads, cache_heads = _heads(config)
    small = {
        name: value[:few] if _per_block(value, blocks) else value for name, value in config.items()
    }
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    square = config["hidden_size"] == head_dim * config["num_attention_heads"]
    small |= {
        "num_hidden_layers": few,
        "num_attention_heads": heads,
        "hidden_size": heads * head_dim + (0 if square else 32),
        "vocab_size": VOCABULARY,
        "dtype": "float32",
    }
    if config.get("num_key_value_heads") is not None:
        small["num_key_value_heads"] = cache_heads
    for name, value in config.items():
        if name.endswith(("token_id", "token_ids")):
            small[name] = None
        elif "intermediate_size" in name and isinstance(value, int):
            small[name] = min(value, _INNER)
        elif name in _WINDOWS and isinstance(value, int):
            small[name] = WINDOW
        elif name in _AT_MOST and isinstance(value, int):
            small[name] = min(value, _AT_MOST[name])
    if config.get("mlp_only_layers"):
        small["mlp_only_layers"] = [at for at in config["mlp_only_layers"] if at < few] or [1]
    return small


def _per_block(value: object, blocks: int) -> bool:
    return isinstance(value, list) and len(value) == blocks


def _enough(config: Mapping[str, Any], blocks: int) -> int:
    """How many of the first blocks show every kind of block that there is."""
    lists = [value for value in config.values() if _per_block(value, blocks)]
    few = min(blocks, _LEAST_BLOCKS)
    while few < min(blocks, _MOST_BLOCKS) and any(
        any(one not in value[:few] for one in value) for value in lists
    ):
        few += 1
    return few


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Heads of queries and of keys: all alike, one for all, or one for a group."""
    heads = config["num_attention_heads"]
    match config.get("num_key_value_heads") or heads:
        case 1:
            return min(2, heads), 1
        case cache_heads if cache_heads == heads:
            return 2, 2
        case _:
            return 4, 2
