"""The weight files of a checkpoint: which file holds which tensor, and reading those asked for.

Names are canonical (``families/family.py``): without the prefix of the base model that some
checkpoints put in front. Only files that hold a tensor asked for are fetched and opened, and a
tensor that is read is a view of the mapped file until its reader copies it.

Nothing in a checkpoint executes: safetensors, or pickles under ``weights_only``.
"""

import functools
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..protocol.errors import ModelError
from .hub import Source

_STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Other dtypes are quantised in ways that need more than a conversion."""

_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""What safetensors calls them."""

Rows = Callable[[Sequence[tuple[int, int]]], list[torch.Tensor]]
"""Entries ``start..stop-1`` along a tensor's first dimension for each pair, on the CPU."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a weight file."""

    shape: torch.Size
    dtype: torch.dtype | None
    """As stored; None: one that cannot be read, see ``_STORED``."""
    _read: Rows
    place: tuple[Path, int] | None = None
    """The file that holds its bytes row by row, and from where on; None: they are found otherwise."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Entries ``start..stop-1`` along the first dimension, on the CPU."""
        return self._read([(start, stop)])[0]

    def gather(self, indices: Sequence[int]) -> torch.Tensor:
        """The entries at ``indices``, one behind the other."""
        entries = self._read([(index, index + 1) for index in indices])
        return entries[0] if len(entries) == 1 else torch.cat(entries)

    def whole(self) -> torch.Tensor:
        """All of it."""
        return self.rows(0, self.shape[0])


Reader = Callable[[str], Stored]
Canonical = Callable[[str], str]
"""The canonical name of a tensor, from its key in a file."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is."""

    filename: str
    key: str
    """Its name in the file."""


class Weights:
    """The index of a checkpoint's tensors. Made by ``open_weights``."""

    def __init__(
        self,
        source: Source,
        places: dict[str, Place],
        *,
        index: dict[str, Any] | None,
        open_file: "OpenFile | None" = None,
    ) -> None:
        self._source = source
        self._places = places
        self._open = open_file or _open
        self._paths: dict[str, Path] = {}
        self.index = index
        """The parsed index file of a sharded checkpoint; None for a single file."""

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def filenames(self) -> list[str]:
        """All weight files, sorted; most of them are perhaps not here."""
        return sorted({place.filename for place in self._places.values()})

    @property
    def names(self) -> list[str]:
        """The canonical names of all tensors, sorted."""
        return sorted(self._places)

    def filename(self, name: str) -> str:
        """The file that holds a tensor."""
        return self._places[name].filename

    def path(self, filename: str) -> Path:
        """The local path of a weight file, fetched if need be."""
        if filename not in self._paths:  # the hub would be asked each time
            path = self._source.find(filename)
            if path is None:
                raise ModelError(f"{self._source.name}: {self._source.missing(filename)}")
            self._paths[filename] = path
        return self._paths[filename]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Stored]]:
        """Yield each of ``names`` with its tensor, file by file.

        Raises ModelError, also while the tensor's rows are read, for a tensor that is missing, a
        file that is missing, corrupt or cut off, and a stored dtype that cannot be converted.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self._places:
                raise ModelError(
                    f"{self._source.name}: the tensor {name} is missing in the weights"
                )
            by_file.setdefault(self._places[name].filename, []).append(name)
        for filename, wanted in sorted(by_file.items()):
            path = self.path(filename)
            _, read = self._open(path)
            for name in wanted:
                yield name, read(self._places[name].key)


def open_weights(source: Source, canonical: Canonical) -> Weights:
    """Find the weights as transformers does: one safetensors file, shards of it, then .bin."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        path = source.find(stem)
        if path is not None:
            keys, _ = _open(path)
            places = {canonical(key): Place(stem, key) for key in keys}
            if not places:
                raise ModelError(f"{path} holds no tensors")
            return Weights(source, places, index=None)
        path = source.find(f"{stem}.index.json")
        if path is not None:
            return _open_sharded(source, path, canonical)
    what = "weights (model.safetensors or pytorch_model.bin, whole or in shards with an index)"
    raise ModelError(f"{source.name}: {source.missing(what)}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError when it holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


def _open_sharded(source: Source, path: Path, canonical: Canonical) -> Weights:
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} has no weight_map from tensor names to files")
    places = {}
    for key, filename in weight_map.items():
        # A name with a path in it could make us read, or fetch over, any file.
        if not isinstance(filename, str) or not re.fullmatch(r"[\w-][\w.-]*", filename):
            raise ModelError(f"{path}: {filename!r} is not the name of a shard file")
        places[canonical(key)] = Place(filename, key)
    return Weights(source, places, index=index)


OpenFile = Callable[[Path], tuple[Iterable[str], Reader]]
"""The keys in a weight file and what reads a tensor by its key."""


def _open(path: Path) -> tuple[list[str], Reader]:
    """The keys in a weight file and what reads a tensor by its key; errors become ModelErrors."""
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_safetensors(path: Path) -> tuple[list[str], Reader]:
    identity = file_identity(path)

    @contextmanager
    def checked() -> Iterator[None]:
        try:
            if file_identity(path) != identity:
                raise ModelError(f"{path} has changed since it was opened; start again")
            yield
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error

    @contextmanager
    def opened() -> Iterator[Any]:
        with checked(), safe_open(path, framework="pt", device="cpu") as file:
            yield file

    def read(key: str) -> Stored:
        @functools.cache
        def mapped() -> torch.Tensor:
            """For single entries: to open the file takes far longer than to read one."""
            file: Any = safe_open(path, framework="pt", device="cpu")
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor

        def rows(pairs: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
            if all(stop - start == 1 for start, stop in pairs):
                with checked():
                    return [_convertible(path, key, mapped()[start:stop]) for start, stop in pairs]
            with opened() as file:
                entries = file.get_slice(key)
                return [_convertible(path, key, entries[start:stop]) for start, stop in pairs]

        with opened() as file:
            entries = file.get_slice(key)
            dtype = _SAFETENSORS.get(entries.get_dtype())
            place = (path, offsets()[key])
            return Stored(torch.Size(entries.get_shape()), dtype, rows, place)

    @functools.cache
    def offsets() -> dict[str, int]:
        return _data_offsets(path)

    with opened() as file:
        return list(file.keys()), read


def _data_offsets(path: Path) -> dict[str, int]:
    """Where in a safetensors file, which was found to be one, the bytes of each tensor begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        key: 8 + size + described["data_offsets"][0]
        for key, described in header.items()
        if key != "__metadata__"
    }


def file_identity(path: Path) -> tuple[int, int, int]:
    """What is different when the file is: rows are read from it for as long as the node runs.

    Raises ModelError if there is none any more.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return status.st_ino, status.st_size, status.st_mtime_ns


def _open_pickle(path: Path) -> tuple[list[str], Reader]:
    content = _load_pickle(path)

    def read(key: str) -> Stored:
        tensor = content.get(key)
        if not isinstance(tensor, torch.Tensor):
            raise ModelError(f"{path} is corrupt: it holds no tensor {key}")

        def rows(pairs: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
            return [_convertible(path, key, tensor)[start:stop] for start, stop in pairs]

        return Stored(tensor.shape, tensor.dtype if tensor.dtype in _STORED else None, rows)

    return [key for key in content if isinstance(key, str)], read


def _convertible(path: Path, key: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in _STORED:
        raise ModelError(
            f"{path}: {key} is stored as {tensor.dtype}; only float64, float32, bfloat16 and "
            "float16 checkpoints are supported"
        )
    return tensor


def _load_pickle(path: Path) -> dict[object, Any]:
    try:
        # Files of before torch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(
            path, mmap=zipfile.is_zipfile(path), weights_only=True, map_location="cpu"
        )
    # A damaged pickle can raise anything at all.
    except Exception as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no dictionary of tensors")
    return content


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path} cannot be read; it is corrupt or was not downloaded completely: {error}"
    )
