"""Become a server of blocks: open the checkpoint, choose a span, load it, measure it."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..inference.checkpoint import Checkpoint, open_checkpoint, open_fetched
from ..inference.device import resolve_device
from ..inference.engine import Engine
from ..inference.memory import blocks_that_fit, default_cache_tokens
from ..inference.model import Blocks
from ..inference.progress import Progress, Step
from ..inference.throughput import Throughput, remembered
from ..inference.torch_thread import TorchThread
from ..protocol.announcement import as_model_name
from ..protocol.errors import ConfigError, ModelError
from ..protocol.manifest import Manifest
from ..protocol.span import Span
from .config import NodeConfig


@dataclass(frozen=True, slots=True)
class Capacity:
    """What this node is to serve, as far as it can be said before looking at the swarm."""

    span: Span | None
    """The blocks that the user chose; None: ``num_blocks`` of them, the swarm decides which."""
    num_blocks: int
    dtype: str
    """What it will hold its weights in: torch's name, or that of the quantisation."""


@dataclass(frozen=True, slots=True)
class Served:
    """Blocks that are loaded and ready to run."""

    engine: Engine
    span: Span
    throughput: Throughput


def announced_name(checkpoint: Checkpoint) -> str:
    """What others are told that the model is called: never a path of this machine."""
    path = Path(checkpoint.name)
    return as_model_name(path.name if path.exists() else checkpoint.name)


def capacity(checkpoint: Checkpoint, config: NodeConfig) -> Capacity:
    """What to serve of the checkpoint. Raises ModelError or ConfigError if that cannot be."""
    total = checkpoint.num_blocks
    device = resolve_device(config.device)
    precision = checkpoint.precision(config.dtype, device, config.quantization)
    if config.blocks is not None:
        if config.blocks.end > total:
            raise ModelError(
                f"blocks {config.blocks} were asked for, but {checkpoint.name} has {total} blocks: "
                f"0:{total}"
            )
        return Capacity(config.blocks, len(config.blocks), precision.name)
    if config.num_blocks is not None:
        return Capacity(None, min(config.num_blocks, total), precision.name)
    fitting = blocks_that_fit(checkpoint, precision, device)
    if fitting < 1:
        raise ConfigError(
            f"not even one block of {checkpoint.name} fits the free memory of {device}; free some, "
            "use another device, or insist with num_blocks (--num-blocks 1)"
        )
    return Capacity(None, fitting, precision.name)


def load(
    checkpoint: Checkpoint,
    span: Span,
    config: NodeConfig,
    progress: Progress | None = None,
    *,
    thread: TorchThread | None = None,
    loaded: Blocks | None = None,
) -> Served:
    """Load and measure ``span``, and start its engine, on ``thread`` if one is given.

    What ``loaded`` holds of it is not loaded again. Raises ModelError or ConfigError.
    """
    device = resolve_device(config.device)
    precision = checkpoint.precision(config.dtype, device, config.quantization)
    cache_tokens = config.cache_tokens or default_cache_tokens(
        checkpoint, len(span), precision, device
    )
    blocks = checkpoint.load_blocks(
        span, config.dtype, device, progress, quantization=config.quantization, loaded=loaded
    )
    if progress is not None:
        progress(Step("measuring this machine's speed"))
    throughput = remembered(
        blocks, model=checkpoint.fingerprint, precision=precision.name, folder=config.data_dir
    )
    if config.throughput is not None:
        throughput = throughput.scaled_to(config.throughput)
    engine = Engine(blocks, cache_tokens=cache_tokens, thread=thread)
    return Served(engine, span, throughput)


def fits_beside(checkpoint: Checkpoint, span: Span, served: Served, config: NodeConfig) -> bool:
    """Whether the memory holds ``span`` beside what is served."""
    device = resolve_device(config.device)
    precision = checkpoint.precision(config.dtype, device, config.quantization)
    shared = span.intersection(served.span)
    more = len(span) - (0 if shared is None else len(shared))
    return more <= blocks_that_fit(checkpoint, precision, device)


def open_model(config: NodeConfig, progress: Progress | None = None) -> Checkpoint:
    """Open the checkpoint that ``config`` names. Raises ModelError."""
    assert config.model is not None
    _set_up_libraries()
    return open_checkpoint(config.model, progress=progress)


def open_fallback(
    name: str, manifest: Manifest | None, progress: Progress | None = None
) -> Checkpoint:
    """Open what ``--fallback`` names; it should have what ``manifest`` says. Raises ModelError."""
    _set_up_libraries()
    return open_checkpoint(name, manifest=manifest, progress=progress)


def open_from_peers(
    name: str, folder: Path, shards: Path, manifest: Manifest, progress: Progress | None
) -> Checkpoint:
    """Open a model whose small files are in ``folder``; its weights will be in ``shards``."""
    _set_up_libraries()
    return open_fetched(name, folder, shards, manifest, progress)


def _set_up_libraries() -> None:
    # The hub's own variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, …) are its settings.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
