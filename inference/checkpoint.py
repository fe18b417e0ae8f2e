"""A model's checkpoint: what it is, and loading the part of it that this node needs.

Loading a span, or the ends, reads the tensors of that part only, from the files that hold them,
one piece at a time straight into its place on the device, in the precision asked for. The modules
are built on the meta device, so no tensor is ever in memory twice.

Whatever is wrong with a model raises ModelError, in words.
"""

import operator
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..protocol.errors import ModelError
from ..protocol.manifest import ENDS, FILES, Manifest
from ..protocol.span import Span
from .cache import CacheShape
from .device import as_device
from .families import Dimensions, Family, find_family
from .gguf import load_gguf_tokenizer, open_gguf
from .hub import FetchedSource, GgufSource, Source, open_source
from .kernel_choice import bytes_per_weight, widens
from .kernels import WeightFormat
from .loading import fill_module
from .model import Blocks, Ends
from .precision import Precision, resolve_precision
from .progress import Progress, Step
from .self_test import require_exact
from .shards import ReadFile, ShardReader, known_manifest, make_manifest, read_small_file
from .weights import Weights, open_weights, read_json

_LARGE = 4 * 10**9
"""Bytes that take ten seconds to read and hash."""


class Checkpoint:
    """An opened checkpoint. Made by ``open_checkpoint``."""

    def __init__(
        self,
        source: Source,
        family: Family,
        config: Any,
        weights: Weights,
        *,
        read_file: ReadFile,
        manifest: Manifest | None,
        progress: Progress | None,
        generation_config: Mapping[str, Any] | None,
        cache_dir: Path | None,
    ) -> None:
        self.name = source.name
        """What the user called it: ``demo``, a path, or a hub id."""
        self.config = config
        """transformers' config object."""
        self.family = family
        self.dimensions: Dimensions = family.dimensions(config)
        self._read_file = read_file
        self._manifest = manifest
        self._progress = progress
        self._source = source
        self._weights = weights
        self._cache_dir = cache_dir
        self.generation_config = generation_config
        """``generation_config.json``; None if there is none."""

    @property
    def location(self) -> str:
        """Where transformers finds it: a folder, or a hub id."""
        return str(self._source.location)

    @property
    def manifest(self) -> Manifest:
        """What the model consists of. Reads all of its files, if nobody has told it."""
        if self._manifest is None:
            self._manifest = make_manifest(
                self._source,
                self._weights,
                self._read_file,
                partial(self.family.block_prefix, self.config),
                self.num_blocks,
                progress=self._progress,
            )
        return self._manifest

    @property
    def fingerprint(self) -> str:
        """The model's identity, 64 hexadecimal digits: the hash of its manifest."""
        return self.manifest.fingerprint

    @property
    def complete(self) -> bool:
        """Whether all of its weight files are here, so that nothing has to be downloaded."""
        return all(map(self._source.local, self._weights.filenames))

    @property
    def quick(self) -> bool:
        """Whether its manifest can be had in a moment: its files are here, and small or known."""
        if self._manifest is not None:
            return True
        if not self.complete:
            return False
        if self._weights_size() < _LARGE:
            return True
        self._manifest = known_manifest(self._weights, self._read_file, self.num_blocks)
        return self._manifest is not None

    @property
    def local_only(self) -> bool:
        """Whether nothing of it can be downloaded."""
        return self._source.local_only

    @property
    def stored_bytes(self) -> int | None:
        """How large all of its weight files are; None if that is not known before they are here."""
        if self.complete:
            return self._weights_size()
        metadata = (self._weights.index or {}).get("metadata")
        size = metadata.get("total_size") if isinstance(metadata, dict) else None
        return size if isinstance(size, int) else None

    @property
    def folder(self) -> Path:
        """Where its files are, or will be when they are downloaded."""
        return self._source.folder

    def _weights_size(self) -> int:
        paths = map(self._weights.path, self._weights.filenames)
        return sum(path.stat().st_size for path in paths)

    def adopt(self, manifest: Manifest) -> bool:
        """Take ``manifest`` for the model's, if small files and tensors' names agree with it.

        So must a chunk of each part of the weights that is here. Whether all of them do is for its
        user to check, as they are used.
        """
        names = set(self._weights.names)
        tensors = (entry.name for shard in manifest.shards[ENDS:] for entry in shard.entries)
        if len(manifest.blocks) != self.num_blocks or not names.issuperset(tensors):
            return False
        files = ShardReader(self._source, self._weights, self._read_file, manifest)
        try:
            here = filter(files.has, range(ENDS, len(manifest.shards)))
            agreed = all(
                map(partial(files.is_right, FILES), range(manifest.files.num_chunks))
            ) and all(
                files.is_right(number, manifest.shards[number].num_chunks // 2) for number in here
            )
        except ModelError:  # one of the files is not there, or has tensors of other shapes
            return False
        if agreed:
            self._manifest = manifest
        return agreed

    @cached_property
    def shards(self) -> ShardReader:
        """The chunks that its files have."""
        return ShardReader(self._source, self._weights, self._read_file, self.manifest)

    @property
    def num_blocks(self) -> int:
        """How many blocks the model has."""
        return self.dimensions.num_blocks

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states between blocks."""
        return self.dimensions.hidden_size

    @property
    def vocab_size(self) -> int:
        """How many logits the head gives."""
        return self.dimensions.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens that the model was trained for."""
        return self.dimensions.max_length

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the weights are stored in, if the config says."""
        dtype = getattr(self.config, "dtype", None)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        return dtype if isinstance(dtype, torch.dtype) else None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, as ``generate`` would have them."""
        value = self._special_token("eos_token_id")
        if isinstance(value, int):
            return (value,)
        return tuple(value) if isinstance(value, list) else ()

    @property
    def pad_token_id(self) -> int:
        """What to fill up a batch with; the end of text when the model has no padding token."""
        value = self._special_token("pad_token_id")
        return value if isinstance(value, int) else next(iter(self.eos_token_ids), 0)

    def _special_token(self, name: str) -> object:
        if self.generation_config is not None:  # then it alone counts, as for transformers
            return self.generation_config.get(name)
        return getattr(self.config, name, None)

    def precision(
        self,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        quantization: str = "none",
    ) -> Precision:
        """What ``--dtype`` and ``--quantization`` mean for this checkpoint. Raises ConfigError."""
        return resolve_precision(dtype, quantization, as_device(device), self.dtype)

    def cache_shape(self, precision: Precision, device: torch.device) -> CacheShape:
        """What a cached token of one block looks like on ``device``."""
        dimensions = self.dimensions
        return CacheShape(dimensions.cache_heads, dimensions.head_dim, precision.cache, device)

    def block_bytes(self, precision: Precision, device: torch.device) -> int:
        """Memory that the weights of one block take on ``device``."""
        weights, exact = precision.weights, False
        if weights is WeightFormat.FLOAT32 and self.dtype in (torch.float16, torch.bfloat16):
            stored = WeightFormat(str(self.dtype).removeprefix("torch."))
            exact = widens(stored, device)
            weights = stored if exact else weights  # held without loss
        return int(self.block_parameters() * bytes_per_weight(weights, device, exact=exact))

    def block_parameters(self) -> int:
        """The number of parameters of one block, the first or the last: mixtures begin dense."""
        with torch.device("meta"):
            ends = [self.family.make_block(self.config, at) for at in {0, self.num_blocks - 1}]
        return max(sum(one.numel() for one in module.parameters()) for module in ends)

    def load_blocks(
        self,
        span: Span,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        progress: Progress | None = None,
        *,
        quantization: str = "none",
        loaded: Blocks | None = None,
    ) -> Blocks:
        """Load the blocks of ``span``; ``dtype`` and ``device`` as torch's or the user's words.

        Those that ``loaded`` has, of the same dtype and device, are shared with it.
        """
        if span.end > self.num_blocks:
            raise ModelError(
                f"blocks {span} were asked for, but {self.name} has {self.num_blocks} blocks: "
                f"0:{self.num_blocks}"
            )
        device = as_device(device)
        precision = self.precision(dtype, device, quantization)
        modules = []
        for block in range(span.start, span.end):
            if loaded is not None and block in loaded.span:
                modules.append(loaded.module(block))
                continue
            if progress is not None:
                progress(Step(f"loading blocks {span}", block - span.start, len(span), "blocks"))
            with torch.device("meta"):
                module = self.family.make_block(self.config, block)
            fill_module(
                module,
                self._weights,
                self.family.conversion(),
                model=self.name,
                canonical=partial(operator.add, self.family.block_prefix(self.config, block)),
                precision=precision,
                device=device,
            )
            modules.append(module)
        if progress is not None:
            progress(Step(f"loading blocks {span}", len(span), len(span), "blocks"))
        return Blocks(
            span,
            modules,
            start=self.family.start(self.config, device),
            dtype=precision.hidden,
            cache_shape=self.cache_shape(precision, device),
            hidden_size=self.hidden_size,
            bias=self.family.bias(self.config, device),
        )

    def load_ends(
        self, dtype: torch.dtype | str = "auto", device: torch.device | str = "auto"
    ) -> Ends:
        """Load what stands before the first block and behind the last."""
        device = as_device(device)
        precision = self.precision(dtype, device)
        ends = self.family.make_ends(self.config, device)
        fill_module(
            ends,
            self._weights,
            self.family.conversion(),
            model=self.name,
            canonical=lambda name: self.family.canonical(name.removeprefix(ends.prefix)),
            tied=self.family.tied(self.config),
            precision=precision,
            device=device,
        )
        ends.dtype, ends.device = precision.hidden, device
        ends.screen()
        return ends

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's (fast) tokenizer."""
        source = self._source
        try:
            if isinstance(source, GgufSource):
                tokenizer = load_gguf_tokenizer(source)
            else:
                tokenizer = AutoTokenizer.from_pretrained(
                    source.location,
                    cache_dir=self._cache_dir,
                    local_files_only=source.local_only,
                    trust_remote_code=False,  # else it asks whoever sits at the terminal
                )
        # transformers, tokenizers and the hub raise errors of many classes here.
        except Exception as error:
            raise ModelError(f"{self.name}: the tokenizer cannot be loaded: {error}") from error
        if not tokenizer.is_fast:
            raise ModelError(f"{self.name}: the model folder needs a tokenizer.json")
        return tokenizer


def open_checkpoint(
    name_or_path: str | Path,
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    tried: bool = False,
    manifest: Manifest | None = None,
) -> Checkpoint:
    """Open ``demo``, a folder in Hugging Face layout, a GGUF file, or a model of the hub by its id.

    On the hub, this fetches the config and the index; of an unsharded model the whole weights.
    ``cache_dir`` is the hub's cache, None its usual place. A model of a family that has to be tried
    is tried, unless it is ``tried`` already. ``manifest``: what the model is known to consist of; else
    that is found out when it is asked for. Raises ModelError in words.
    """
    source = open_source(str(name_or_path), cache_dir=cache_dir, progress=progress)
    if progress is not None:
        progress(Step(f"opening {source.name}"))
    return _open(source, progress, tried=tried, manifest=manifest, cache_dir=cache_dir)


def open_fetched(
    name: str, folder: Path, shards: Path, manifest: Manifest, progress: Progress | None = None
) -> Checkpoint:
    """Open a model from peers: its small files are in ``folder``, ``shards`` get its weights.

    Raises ModelError in words.
    """
    return _open(FetchedSource(name, folder, shards), progress, manifest=manifest)


def _open(
    source: Source,
    progress: Progress | None,
    *,
    tried: bool = False,
    manifest: Manifest | None = None,
    cache_dir: Path | None = None,
) -> Checkpoint:
    file = open_gguf(source) if isinstance(source, GgufSource) else None
    raw = _read_config(source) if file is None else file.config
    family, config = _parsed(source, raw)
    if family.tried and not tried:
        require_exact(source.name, config, partial(open_checkpoint, tried=True), progress)
    generation_path = source.find("generation_config.json")
    if file is None:
        weights = open_weights(source, family.canonical)
    else:
        weights = file.weights(config, family.canonical)
    return Checkpoint(
        source,
        family,
        config,
        weights,
        read_file=partial(read_small_file, source) if file is None else file.small_file,
        manifest=manifest,
        progress=progress,
        generation_config=None if generation_path is None else read_json(generation_path),
        cache_dir=cache_dir,
    )


def open_config(name_or_path: str | Path, *, cache_dir: Path | None = None) -> Any:
    """transformers' config object alone, of what ``open_checkpoint`` opens. Raises ModelError."""
    source = open_source(str(name_or_path), cache_dir=cache_dir)
    file = open_gguf(source) if isinstance(source, GgufSource) else None
    _, config = _parsed(source, _read_config(source) if file is None else file.config)
    return config


def _read_config(source: Source) -> dict[str, Any]:
    path = source.find("config.json")
    if path is None:
        raise ModelError(f"{source.name} is no model: {source.missing('config.json')}")
    return read_json(path)


def _parsed(source: Source, raw: dict[str, Any]) -> tuple[Family, Any]:
    family = find_family(raw.get("model_type"))
    if raw.get("quantization_config"):
        raise ModelError(f"{source.name} is a quantised checkpoint; give the original one")
    return family, family.parse_config(raw)
