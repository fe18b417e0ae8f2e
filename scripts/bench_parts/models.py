"""Models to measure: random weights at real dimensions, so that nothing is downloaded.

They are written once, in Hugging Face layout, every block in a file of its own. Of the largest
models only the first blocks are written: the config says how many there really are. Every block
holds the same numbers in another order, which costs neither time nor truth: no kernel looks at
what it multiplies.
"""

from __future__ import annotations

import json
import math
import pathlib
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import IO

import torch
from transformers import BloomConfig, BloomForCausalLM

LAYOUT = 1
"""Raise it when what is written changes: old files are then left alone and new ones written."""
VOCABULARY = 250_880
POOL = 8_388_593
"""Random numbers, a prime so that no two rows of a matrix are the same ones."""
STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Names of dtypes in a safetensors file."""


@dataclass(frozen=True)
class ModelSize:
    """A model's dimensions, and how much of it is written."""

    name: str
    hidden_size: int
    num_blocks: int
    heads: int
    dtype: torch.dtype = torch.float16
    """In which it is stored, as the hub's model of these dimensions is."""
    written_blocks: int | None = None
    """None: the whole model, with its ends."""
    vocabulary: int = VOCABULARY

    @property
    def whole(self) -> bool:
        """Whether it can write text, and not only run blocks."""
        return self.written_blocks is None

    @property
    def parameters(self) -> int:
        """About as many numbers as the whole model holds."""
        return self.num_blocks * 12 * self.hidden_size**2 + self.vocabulary * self.hidden_size


SIZES = {
    size.name: size
    for size in (
        ModelSize("560m", 1024, 24, 16),
        ModelSize("1b7", 2048, 24, 16),
        ModelSize("560m-32bit", 1024, 24, 16, dtype=torch.float32),
        ModelSize("1b7-32bit", 2048, 24, 16, dtype=torch.float32),
        ModelSize("7b1", 4096, 30, 32, written_blocks=4),
        ModelSize("176b", 14336, 70, 112, dtype=torch.bfloat16, written_blocks=1),
    )
}
"""BLOOM's, by what the hub calls them; with weights that 16 bits don't hold, too."""
TINY = ModelSize("tiny", 64, 6, 4, vocabulary=512)
"""To try a benchmark, not to measure anything."""
TINY_WIDE = ModelSize("tiny-32bit", 64, 6, 4, dtype=torch.float32, vocabulary=512)
TINY_BLOCK = ModelSize("tiny-block", 64, 6, 4, written_blocks=2, vocabulary=512)


def model_folder(size: ModelSize, models: pathlib.Path) -> pathlib.Path:
    """The folder of a model of ``size`` below ``models``; written first if it is not there."""
    part = "" if size.written_blocks is None else f"-{size.written_blocks}-blocks"
    folder = models / f"bloom-{size.name}{part}-{LAYOUT}"
    if not folder.exists():
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_model(size, unfinished)
        unfinished.rename(folder)
    return folder


def clean(models: pathlib.Path) -> None:
    """Remove everything that ``model_folder`` has written there."""
    for folder in models.glob("bloom-*"):
        shutil.rmtree(folder)


class RandomNumbers:
    """Writes normally distributed numbers: the same pool of them round and round."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
        self._dtype = dtype
        self._scaled: dict[tuple[float, float], torch.Tensor] = {}
        self._offset = 0

    def write(self, file: IO[bytes], count: int, mean: float, deviation: float) -> None:
        """Write ``count`` numbers, each in ``dtype``."""
        if (mean, deviation) not in self._scaled:
            scaled = torch.add(mean, self._pool, alpha=deviation)
            self._scaled[mean, deviation] = scaled.to(self._dtype).view(torch.uint8)
        data = self._scaled[mean, deviation].numpy().data
        width = self._dtype.itemsize
        while count:
            taken = min(count, POOL - self._offset)
            file.write(data[self._offset * width : (self._offset + taken) * width])
            self._offset = (self._offset + taken) % POOL
            count -= taken


def write_model(size: ModelSize, folder: pathlib.Path) -> None:
    """Write config, tokenizer and weights of a model of ``size`` into an empty folder."""
    (folder / "config.json").write_text(json.dumps(config_of(size), indent=2))
    demo = resources.files("petals.inference") / "demo_model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    numbers = RandomNumbers(size.dtype)
    parts = parts_of(size)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(parts, start=1):
        filename = f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_tensors(folder / filename, shapes, size, numbers)
        weight_map |= dict.fromkeys(shapes, filename)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def config_of(size: ModelSize) -> dict[str, object]:
    """The model's ``config.json``."""
    return {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden_size,
        "n_layer": size.num_blocks,
        "n_head": size.heads,
        "layer_norm_epsilon": 1e-5,
        "seq_length": 2048,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,  # texts are as long as one asks for
        "pad_token_id": 3,
        "dtype": str(size.dtype).removeprefix("torch."),
    }


def parts_of(size: ModelSize) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of the tensors of each file, by name: the ends, then block after block."""
    config = BloomConfig.from_dict(config_of(size) | {"n_layer": 1})
    with torch.device("meta"):
        model = BloomForCausalLM(config)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    ends = {name: shape for name, shape in shapes.items() if ".h.0." not in name}
    block = {name: shape for name, shape in shapes.items() if ".h.0." in name}
    blocks = size.num_blocks if size.written_blocks is None else size.written_blocks
    return [ends] * size.whole + [
        {name.replace(".h.0.", f".h.{number}."): shape for name, shape in block.items()}
        for number in range(blocks)
    ]


def write_tensors(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    size: ModelSize,
    numbers: RandomNumbers,
) -> None:
    """Write a safetensors file tensor by tensor: a whole block of 176B never is in memory.

    https://huggingface.co/docs/safetensors has the format: the header's length in 8 bytes, the
    header in JSON, the tensors' bytes.
    """
    described: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * size.dtype.itemsize
        described[name] = {
            "dtype": STORED[size.dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, shape in shapes.items():
            numbers.write(file, math.prod(shape), *distribution(name, size))


def distribution(name: str, size: ModelSize) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's random numbers.

    As BLOOM is initialised, but for the final norm: with a plain one and a tied head, a random
    model only repeats its last token.
    """
    if name.endswith("ln_f.weight"):
        return 0.0, 1.0
    if "layernorm" in name and name.endswith("weight"):
        return 1.0, 0.02
    return 0.0, 0.02 * math.sqrt(1024 / max(size.hidden_size, 1024))
