"""Random Llamas in GGUF files, as llama.cpp writes them."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

VOCABULARY = 97


def write_llama(
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    *,
    hidden: int = 64,
    inner: int = 96,
    blocks: int = 3,
    vocabulary: int = VOCABULARY,
    **fields: Any,
) -> Path:
    """A random Llama as llama.cpp writes it, its matrices quantised."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(blocks)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // 4)
    writer.add_vocab_size(vocabulary)
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name.replace("__", "."), value)
        else:
            writer.add_uint32(name.replace("__", "."), value)
    shapes = {"token_embd": (vocabulary, hidden), "output_norm": (hidden,)}
    for block in range(blocks):
        own = {
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
            "attn_q": (hidden, hidden),
            "attn_k": (hidden // 2, hidden),
            "attn_v": (hidden // 2, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        shapes |= {f"blk.{block}.{name}": shape for name, shape in own.items()}
    dice = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = dice.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + values / 10)
        else:
            packed = quantize(values * 1.5 * shape[1] ** -0.5, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
