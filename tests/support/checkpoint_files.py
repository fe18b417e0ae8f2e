"""Changing the files of a checkpoint that was saved by transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def save_as_bin(folder: Path, **torch_options: Any) -> None:
    """Turn every safetensors file of ``folder``, and the index, into their .bin twins."""
    for path in folder.glob("*.safetensors"):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name, **torch_options)
        path.unlink()
    for path in folder.glob("*.index.json"):
        text = path.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        path.unlink()


def strip_prefix(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    save_file(tensors, path)


def change_tensors(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor | None] = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
