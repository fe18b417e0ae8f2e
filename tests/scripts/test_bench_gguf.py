"""A benchmark's model as a GGUF file, read back by transformers."""

from pathlib import Path

import pytest
import torch
from bench_parts.gguf_file import write_gguf
from bench_parts.models import TINY, model_folder
from safetensors.torch import load_file
from transformers import BloomForCausalLM


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 0.0), (16, 0.0), (8, 0.02), (4, 0.2)])
def test_a_gguf_holds_the_same_model(tmp_path: Path, bits: int, tolerance: float) -> None:
    folder = model_folder(TINY, tmp_path)
    written: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        written |= load_file(file)
    path = tmp_path / "model.gguf"
    write_gguf(folder, path, bits)
    read = BloomForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert read.config.n_layer == TINY.num_blocks
    parameters = dict(read.named_parameters())
    assert parameters.keys() == written.keys()
    for name, tensor in written.items():
        expected = tensor.float()
        error = (parameters[name].float() - expected).norm() / expected.norm()
        assert error <= tolerance, name
