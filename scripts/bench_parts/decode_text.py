"""One session's text, embedding and head included, against transformers and disk offload."""

from __future__ import annotations

import gc
import os
import pathlib
import statistics
from collections.abc import Iterator

import torch
from petals.inference.checkpoint import open_checkpoint

from .local import (
    FLOAT16,
    FLOAT32,
    Local,
    LocalSession,
    Mode,
    bits_a_weight,
    mode_label,
    modes,
    name_of,
    token_ids,
)
from .models import ModelSize
from .report import Report
from .rivals import DiskOffload, Transformers
from .settings import Settings, fits_memory
from .timing import Sampler, medians

AIMS = {torch.float32: 1.5, torch.bfloat16: 2.0}
"""How far ahead of transformers in a dtype decoding should be, with every weight at its full value."""
OFFLOADED = ("560m", "tiny")
"""Models that are also run from the disk; of larger ones a token takes too long."""
OFFLOAD_TOKENS = 2


def measure(settings: Settings, report: Report) -> None:
    """Every model that writes text, in every dtype; and those with weights of 32 bits."""
    for size in settings.whole:
        for mode in modes():
            beside = torch.float32 if mode is FLOAT32 else torch.float16
            in_mode(settings, report, size, mode, [beside, torch.bfloat16])
    for size in settings.wide:
        in_mode(settings, report, size, FLOAT32, [torch.float32])


def in_mode(
    settings: Settings, report: Report, size: ModelSize, mode: Mode, rivals: list[torch.dtype]
) -> None:
    """One model in one dtype of ours, against transformers in each of ``rivals``."""
    folder = settings.folder(size, report)
    label = mode_label(size, folder, mode)
    held = bits_a_weight(open_checkpoint(folder), mode) / 8
    needed = size.parameters * (held + sum(dtype.itemsize for dtype in rivals))
    if not fits_memory(needed, f"{label} beside transformers", report):
        return
    with Local(folder, mode, ends=True) as local:
        against_transformers(settings, report, local, rivals, label)
        if mode is FLOAT16 and size.name in OFFLOADED:
            against_offload(settings, report, local, size, label)
    gc.collect()


def open_with_prompt(settings: Settings, local: Local) -> tuple[LocalSession, list[int]]:
    """A session with room for a prompt of the usual length and what is decoded behind it."""
    prompt = token_ids(local.checkpoint.vocab_size, settings.lengths[0])
    return local.open(len(prompt) + settings.tokens + 1), prompt


def against_transformers(
    settings: Settings, report: Report, local: Local, dtypes: list[torch.dtype], label: str
) -> None:
    """Prefill and decoding, in turns with transformers in each of ``dtypes``."""
    session, prompt = open_with_prompt(settings, local)
    rivals = {dtype: Transformers(local.folder, dtype) for dtype in dtypes}
    contestants: dict[str, LocalSession | Transformers] = {"ours": session}
    contestants |= {str(dtype): rival for dtype, rival in rivals.items()}

    def prefill(one: LocalSession | Transformers) -> Sampler:
        return lambda: one.prefill(prompt)

    def decode(one: LocalSession | Transformers) -> Sampler:
        return lambda: one.decode(settings.tokens)

    prefills = medians({k: prefill(one) for k, one in contestants.items()}, settings.rounds)
    decodes = medians({k: decode(one) for k, one in contestants.items()}, settings.rounds)
    session.close()
    for dtype in dtypes:
        rival = f"transformers {name_of(dtype)}"
        report.ahead(
            f"{label}: text of one session, KV {len(prompt)}",
            1 / decodes["ours"],
            "tokens/s",
            rival,
            1 / decodes[str(dtype)],
            AIMS.get(dtype) if local.mode is FLOAT32 else None,
        )
        report.ahead(
            f"{label}: prefill of {len(prompt)} tokens",
            len(prompt) / prefills["ours"],
            "tokens/s",
            rival,
            len(prompt) / prefills[str(dtype)],
        )


def against_offload(
    settings: Settings, report: Report, local: Local, size: ModelSize, label: str
) -> None:
    """The same weights, read from the disk for every token, in transformers' fastest dtype."""
    session, prompt = open_with_prompt(settings, local)
    shards = list(local.folder.glob("*.safetensors"))
    with DiskOffload(local.folder, torch.float16, size.num_blocks) as rival:
        rival.prefill(prompt[:16])

        def cold() -> float:
            return statistics.mean(cold_tokens(rival, shards))

        session.prefill(prompt)
        decodes = medians(
            {
                "ours": lambda: session.decode(settings.tokens),
                "in the page cache": lambda: rival.decode(OFFLOAD_TOKENS),
                "not in the page cache": cold,
            },
            settings.rounds,
        )
    session.close()
    for name in ("in the page cache", "not in the page cache"):
        report.ahead(
            f"{label}: text of one session, KV {len(prompt)}",
            1 / decodes["ours"],
            "tokens/s",
            f"accelerate disk offload float16, {name}",
            1 / decodes[name],
        )


def cold_tokens(rival: DiskOffload, shards: list[pathlib.Path]) -> Iterator[float]:
    """Seconds of each of a few tokens, the weights' files dropped from the page cache before."""
    for _ in range(OFFLOAD_TOKENS):
        for path in shards:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        yield rival.decode(1)
