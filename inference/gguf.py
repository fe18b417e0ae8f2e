"""Models in one GGUF file, as llama.cpp has them: read block by block, dequantised as they are read.

transformers knows how to read a GGUF: which fields make a config, which tensor is which parameter,
and where llama.cpp has changed a tensor (rotary halves interleaved, norms with one added). It does
so for all tensors at once, in float32. Here its tables are asked for one tensor at a time: the file
is mapped, rows of a matrix are dequantised piece by piece, and a tensor that has to be put back into
shape is in memory as a whole only while it is packed.

A file that says something that those tables would pass over is refused: it would be another model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from ..protocol.errors import ModelError
from .hub import GgufSource
from .weights import Canonical, Place, Stored, Weights, file_identity

_AS_THEY_ARE = ("token_embd.weight", "output.weight")
"""Tensors that no processor changes; the first is read row by row for as long as a node runs."""
_UNREAD = ("rope.scaling.type", "expert_count")
"""Fields that change what the weights mean, and that transformers does not read for all."""


class Gguf:
    """An opened GGUF file. Made by ``open_gguf``."""

    def __init__(
        self, source: GgufSource, reader: GGUFReader, config: dict[str, Any], architecture: str
    ) -> None:
        self.config = config
        """As a ``config.json``."""
        self._source = source
        self._identity = file_identity(source.path)
        self._tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        kind: type[TensorProcessor] = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = kind(config=config)

    def weights(self, config: PreTrainedConfig, canonical: Canonical) -> Weights:
        """The tensors, named canonically. Raises ModelError if some have no place in the model."""
        path = self._source.path
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        try:
            names = get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise ModelError(f"{path}: {error}") from error
        unknown = sorted(self._tensors.keys() - names.keys())
        if unknown:
            raise ModelError(
                f"{path} holds tensors that have no place in a {config.model_type} model here: "
                f"{', '.join(unknown[:5])}; use the model's safetensors instead"
            )
        places = {canonical(names[key]): Place(path.name, key) for key in self._tensors}
        return Weights(self._source, places, index=None, open_file=lambda _: (places, self._read))

    def _read(self, key: str) -> Stored:
        tensor = self._tensors[key]
        if key in _AS_THEY_ARE or type(self._processor) is TensorProcessor:
            shape = torch.Size(int(size) for size in reversed(tensor.shape))
            return Stored(shape, self._checked(lambda pairs: [_rows(tensor, *at) for at in pairs]))
        whole = self._processor.process(_dequantized(tensor, tensor.data), name=key).weights
        kept = _as_torch(whole)
        return Stored(kept.shape, lambda pairs: [kept[start:stop] for start, stop in pairs])

    def _checked(
        self, read: Callable[[Sequence[tuple[int, int]]], list[torch.Tensor]]
    ) -> Callable[[Sequence[tuple[int, int]]], list[torch.Tensor]]:
        def rows(pairs: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
            if file_identity(self._source.path) != self._identity:
                raise ModelError(
                    f"{self._source.path} has changed since it was opened; start again"
                )
            return read(pairs)

        return rows


def open_gguf(source: GgufSource) -> Gguf:
    """Open the file of ``source``. Raises ModelError."""
    path = source.path
    try:
        reader = GGUFReader(path)
        config = load_gguf_checkpoint(path)["config"]
        architecture = str(reader.fields["general.architecture"].contents())
    # A damaged file, or one of an architecture that transformers can't read, can raise anything.
    except Exception as error:
        raise ModelError(f"{path} cannot be read as GGUF: {error}") from error
    if "split.count" in reader.fields:
        raise ModelError(f"{path} is one of several parts; join them with llama-gguf-split --merge")
    for field in _UNREAD:
        value = reader.fields.get(f"{architecture}.{field}")
        if value is not None and value.contents() not in (0, "none"):
            raise ModelError(
                f"{path}: {architecture}.{field} is {value.contents()}, which is not read from a "
                "GGUF file; use the model's safetensors instead"
            )
    return Gguf(source, reader, config, architecture)


def _rows(tensor: ReaderTensor, start: int, stop: int) -> torch.Tensor:
    return _as_torch(_dequantized(tensor, tensor.data[start:stop]))


def _dequantized(tensor: ReaderTensor, data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = dequantize(data, tensor.tensor_type)
    return values


def _as_torch(values: np.ndarray[Any, Any]) -> torch.Tensor:
    """A copy where torch would otherwise have a view of the mapped file, which is read-only."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))
