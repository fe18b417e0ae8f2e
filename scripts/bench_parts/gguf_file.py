"""A benchmark's model as one GGUF file, for rivals that read nothing else."""

from __future__ import annotations

import json
import pathlib

import gguf
from safetensors import safe_open

HELD = {
    32: (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F32),
    16: (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F16),
    8: (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q8_0),
    4: (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0),
}
"""By bits: what blocks and what the embedding, which is the head, too, are held in."""
EMBEDDING = "token_embd.weight"


def write_gguf(folder: pathlib.Path, path: pathlib.Path, bits: int) -> None:
    """Write the BLOOM in ``folder``, in Hugging Face layout, to ``path``; without its tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    hidden, blocks, heads = config["hidden_size"], config["n_layer"], config["n_head"]
    writer = gguf.GGUFWriter(path, "bloom")
    writer.add_context_length(config["seq_length"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(4 * hidden)
    writer.add_block_count(blocks)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BLOOM, blocks)
    of_blocks, of_embedding = HELD[bits]
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                data = tensors.get_tensor(name).float()
                if "query_key_value" in name:  # head by head there, all queries first here
                    apart = data.view(heads, 3, hidden // heads, *data.shape[1:])
                    data = apart.transpose(0, 1).reshape(data.shape)
                to = names.get_name(name.removeprefix("transformer."), (".weight", ".bias"))
                if to is None:
                    raise ValueError(f"GGUF has no name for {name}")
                kind = of_embedding if to == EMBEDDING else of_blocks
                if data.dim() == 1:  # vectors stay as they are everywhere
                    kind = gguf.GGMLQuantizationType.F32
                writer.add_tensor(to, gguf.quantize(data.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
