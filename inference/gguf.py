"""Models in one GGUF file, as llama.cpp has them: read block by block, dequantised as they are read.

transformers knows how to read a GGUF: which fields make a config, which tensor is which parameter,
and where llama.cpp has changed a tensor (rotary halves interleaved, norms with one added). It does
so for all tensors at once, in float32. Here its tables are asked for one tensor at a time: rows of a
matrix are read and dequantised piece by piece, and a tensor that has to be put back into
shape is in memory as a whole only while it is packed.

A file that says something that those tables would pass over is refused: it would be another model.
"""

import json
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFEndian, GGUFReader, GGUFValueType, ReaderTensor, dequantize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
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
_AT_ONCE = 1 << 18
"""Weights that are dequantised together."""
_LONG = 4096
"""Entries of an array that is a vocabulary, and not a setting for each block."""


class _Header(GGUFReader):
    """A reader that steps over vocabularies, which take gguf's own seconds to take in."""

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type == GGUFValueType.ARRAY:
            order = "<" if self.endianess.name == "LITTLE" else ">"
            data: Any = self.data  # numpy does not say that it is a buffer
            kind, count = struct.unpack_from(f"{order}IQ", data, orig_offs)
            if count > _LONG:
                end = orig_offs + 12
                if kind == GGUFValueType.STRING:
                    for _ in range(count):
                        end += 8 + struct.unpack_from(f"{order}Q", data, end)[0]
                else:
                    size = np.dtype(self.gguf_scalar_to_np[GGUFValueType(kind)]).itemsize
                    end += size * count
                return end - orig_offs, [], [], [GGUFValueType.ARRAY, GGUFValueType(kind)]
        parts: tuple[int, list[Any], list[int], list[GGUFValueType]]
        parts = super()._get_field_parts(orig_offs, raw_type)
        return parts


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
        self._has_tokenizer = "tokenizer.ggml.tokens" in reader.fields
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

    def small_file(self, name: str) -> bytes | None:
        """What a folder of this model would have under ``name``; None: nothing. Raises ModelError."""
        return self._small_files.get(name)

    @cached_property
    def _small_files(self) -> dict[str, bytes]:
        source = self._source
        files = {"config.json": json.dumps(self.config, indent=2, sort_keys=True).encode()}
        if not self._has_tokenizer:
            return files
        with tempfile.TemporaryDirectory() as folder:
            try:
                load_gguf_tokenizer(source).save_pretrained(folder)
            # transformers, tokenizers and gguf raise errors of many classes here.
            except Exception as error:
                raise ModelError(f"{source.path}: its tokenizer cannot be read: {error}") from error
            return files | {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def _read(self, key: str) -> Stored:
        tensor = self._tensors[key]
        path = self._source.path
        if key in _AS_THEY_ARE or type(self._processor) is TensorProcessor:
            rows = self._checked(
                lambda pairs: [_as_torch(_dequantized(path, tensor, *at)) for at in pairs]
            )
            return Stored(_shape(tensor), torch.float32, rows)
        values = _dequantized(path, tensor, 0, _shape(tensor)[0])
        whole = self._processor.process(values, name=key).weights
        kept = _as_torch(whole)
        return Stored(
            kept.shape, kept.dtype, lambda pairs: [kept[start:stop] for start, stop in pairs]
        )

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
        reader = _Header(path)
        with _headers_only():
            config = load_gguf_checkpoint(path)["config"]
        architecture = str(reader.fields["general.architecture"].contents())
    # A damaged file, or one of an architecture that transformers can't read, can raise anything.
    except Exception as error:
        raise ModelError(f"{path} cannot be read as GGUF: {error}") from error
    if reader.endianess is not GGUFEndian.LITTLE:
        raise ModelError(f"{path} is big-endian; convert it with gguf-convert-endian")
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


def load_gguf_tokenizer(source: GgufSource) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template in the file of ``source``. Raises whatever transformers does."""
    with tempfile.TemporaryDirectory() as alone:  # it would take what lies beside the file for more
        name = "model.gguf"
        Path(alone, name).symlink_to(source.path.resolve())
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(alone, gguf_file=name)
        return tokenizer


@contextmanager
def _headers_only() -> Iterator[None]:
    """transformers opens the file again: let it use our reader, too."""
    kept = gguf.GGUFReader
    gguf.GGUFReader = _Header  # type: ignore[misc]
    try:
        yield
    finally:
        gguf.GGUFReader = kept  # type: ignore[misc]


def _dequantized(path: Path, tensor: ReaderTensor, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Rows in float32; a part at a time, because gguf takes several times what comes out.

    They are read, not mapped: what was mapped would stay in memory, beside what was made of it.
    """
    width = int(tensor.n_elements) // _shape(tensor)[0]
    values = np.empty((stop - start, width), dtype=np.float32)
    size = tensor.n_bytes // _shape(tensor)[0]
    step = max(1, _AT_ONCE // width)
    for first in range(start, stop, step):
        count = min(step, stop - first)
        offset = tensor.data_offset + first * size
        part = np.fromfile(path, np.uint8, count * size, offset=offset).reshape(count, size)
        values[first - start :][:count] = dequantize(part, tensor.tensor_type)
    return values.reshape(stop - start, *_shape(tensor)[1:])


def _shape(tensor: ReaderTensor) -> torch.Size:
    return torch.Size(int(size) for size in reversed(tensor.shape))


def _as_torch(values: np.ndarray[Any, Any]) -> torch.Tensor:
    """A copy where torch would otherwise have a view of the mapped file, which is read-only."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))
