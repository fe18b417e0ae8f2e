"""How much is measured: everything at real dimensions, or a little of it to try the suite."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from .bandwidth import Bandwidth
from .models import SIZES, TINY, TINY_BLOCK, TINY_WIDE, ModelSize, model_folder
from .report import Report


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all subcommands are given."""

    models: pathlib.Path
    """Folder that the models are written to."""
    quick: bool = False
    """Whether every path is only tried."""
    whole: tuple[ModelSize, ...] = (SIZES["560m"], SIZES["1b7"])
    """Models that write text."""
    wide: tuple[ModelSize, ...] = (SIZES["560m-32bit"], SIZES["1b7-32bit"])
    """The same with weights of 32 bits: of them, only what is said of float32 is measured."""
    block: ModelSize = SIZES["7b1"]
    """A model of which one block is measured."""
    large_block: ModelSize = SIZES["176b"]
    """One of which a block is loaded by a process of its own."""
    rounds: int = 5
    """Samples of each contestant."""
    tokens: int = 5
    """Decoded for one sample."""
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Contexts to decode behind; the first one is that of all comparisons."""
    sessions: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """How many decode together."""
    longest_session: int = 1024
    """Their contexts are spread up to it."""
    exact_sessions: int = 16
    exact_tokens: int = 12
    prompt: int = 1024
    """Tokens of the long prompt that arrives while others decode."""
    shared_prompt: int = 512
    """Tokens of a prompt that two sessions begin with."""
    processes: tuple[int, ...] = (1, 2, 3)
    """Into how many a model is divided."""
    swarm_tokens: int = 12
    relayed_tokens: int = 48
    """Of a text over a relay."""
    round_trips: int = 100
    """Of a packet, for one sample."""
    bulk_pieces: int = 64
    """MiB of a transfer."""
    held_out_rows: int = 1000
    """At most so many rows of held-out text are read."""
    fetched_bytes: int = 256_000_000
    """Of weights, that are fetched for one sample."""
    beside_tokens: int = 8
    """That a session decodes at a time while weights are given."""
    beside_seconds: float = 6.0
    """For which they are given."""
    large_frames: bool = True
    """Whether the large tensor of ``frames`` is really large."""
    bandwidth: Bandwidth = field(default_factory=Bandwidth)

    def folder(self, size: ModelSize, report: Report) -> pathlib.Path:
        """Where the model of ``size`` is; written if it is not there yet."""
        report.say(f"{size.name}: looking for its files below {self.models}")
        return model_folder(size, self.models)

    @property
    def sizes(self) -> Sequence[ModelSize]:
        """Every model that is needed."""
        return (*self.whole, *self.wide, self.block, self.large_block)


def tiny(models: pathlib.Path) -> Settings:
    """A minute's worth, on a tiny model: every path is taken, nothing is measured well."""
    return Settings(
        models=models,
        quick=True,
        whole=(TINY,),
        wide=(TINY_WIDE,),
        block=TINY_BLOCK,
        large_block=TINY_BLOCK,
        rounds=2,
        tokens=2,
        lengths=(16, 32),
        sessions=(1, 4),
        longest_session=64,
        exact_sessions=4,
        exact_tokens=4,
        prompt=256,
        shared_prompt=96,
        processes=(3,),
        swarm_tokens=4,
        relayed_tokens=4,
        round_trips=2,
        bulk_pieces=1,
        held_out_rows=4,
        fetched_bytes=1_000_000,
        beside_tokens=3,
        beside_seconds=0.5,
        large_frames=False,
        bandwidth=Bandwidth(megabytes=16),
    )


def chosen(
    models: pathlib.Path, *, quick: bool, rounds: int | None, only: Sequence[str] | None
) -> Settings:
    """What the command line asks for; ``only`` names the whole models to be measured."""
    settings = tiny(models) if quick else Settings(models=models)
    if rounds is not None:
        settings = dataclasses.replace(settings, rounds=rounds)
    if only is not None and not quick:
        whole, wide = (
            tuple(size for size in sizes if size.name in only)
            for sizes in (settings.whole, settings.wide)
        )
        settings = dataclasses.replace(settings, whole=whole, wide=wide)
    return settings


def fits_memory(needed: float, what: str, report: Report) -> bool:
    """Whether ``needed`` bytes are free, with some to spare; if not, it is said what is left out."""
    free = psutil.virtual_memory().available
    if needed * 1.1 < free:
        return True
    report.say(f"left out: {what} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    return False
