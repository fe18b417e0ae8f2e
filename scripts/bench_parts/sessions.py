"""Many sessions that decode together at one node: how much they share, and whether it is exact."""

from __future__ import annotations

import gc
import pathlib
import statistics
from collections.abc import Sequence

import torch

from .driven import rates
from .local import AUTO, DEADLINE, FLOAT32, Local, LocalSession, mode_label, token_ids
from .models import ModelSize
from .report import Aim, Curve, Picture, Report, Row, number
from .rivals import Transformers
from .settings import Settings, fits_memory

JUDGED = 16
"""Sessions for which the aims are."""
AIMS = {"560m": 3.5, "1b7": 5.0, "560m-32bit": 3.5, "1b7-32bit": 5.0}
"""Times the speed of one session that they should have in all."""
LEAST_SHARE = 0.8
SHORTEST = 16
ROOM = 256
"""Tokens that the fastest session may be ahead of the slowest."""


def measure(settings: Settings, report: Report) -> None:
    """Every model that writes text; blocks only, as embedding and head are the originators'."""
    curves: list[Curve] = []
    for size in (*settings.whole, *settings.wide):
        folder = settings.folder(size, report)
        label = mode_label(size, folder, AUTO)
        with Local(folder, AUTO, cache_tokens=100_000) as local:
            curves.append(Curve(label, together(settings, report, local, size, label)))
        gc.collect()
        if fits_memory(size.parameters * 4, f"{size.name} float32", report):
            exactness(settings, report, size, folder)
    report.pictures.append(
        Picture(
            "throughput_by_sessions.png",
            f"Sessions decoding together, contexts up to {settings.longest_session}",
            "sessions",
            "tokens/s in all, through all blocks",
            curves,
        )
    )


def spread(count: int, longest: int) -> list[int]:
    """Contexts of ``count`` sessions, evenly over 0 … ``longest``; their mean is half of it."""
    return [longest * (2 * place + 1) // (2 * count) for place in range(count)]


def chosen(everybody: Sequence[LocalSession], count: int) -> list[LocalSession]:
    """``count`` of the sessions, evenly spread, so that few have it no easier than many."""
    step = len(everybody) / count
    return [everybody[int((place + 0.5) * step)] for place in range(count)]


def together(
    settings: Settings, report: Report, local: Local, size: ModelSize, label: str
) -> dict[float, float]:
    """Tokens per second in all, by the number of sessions."""
    token = local.blocks.cache_shape.bytes_per_token * len(local.span)
    counts = [
        count
        for count in settings.sessions
        if fits_memory(
            count * settings.longest_session * token, f"{label}: {count} sessions' cache", report
        )
    ]
    report.say(f"{label}: prefilling {counts[-1]} sessions")
    opened = []
    for length in spread(counts[-1], settings.longest_session):
        opened.append(local.open(length + ROOM))
        opened[-1].fill(length)
    totals: dict[int, list[float]] = {count: [] for count in counts}
    shares: dict[int, list[float]] = {count: [] for count in counts}
    for turn in range(settings.rounds + 1):
        for count in counts:
            each = rates(chosen(opened, count), settings.tokens)
            if turn:  # the first does not count
                totals[count].append(sum(each))
                shares[count].append(min(each) / statistics.mean(each))
    for session in opened:
        session.close()
    medians = {count: statistics.median(total) for count, total in totals.items()}
    alone = medians[counts[0]]
    for count, total in medians.items():
        name = f"{label}: {count} sessions decode, KV up to {settings.longest_session}"
        aim = AIMS.get(size.name) if count == JUDGED else None
        report.ahead(name, total, "tokens/s in all", "one session alone", alone, aim)
        if count > 1:
            share = statistics.median(shares[count])
            report.add(
                Row(
                    f"{label}: slowest of {count} sessions",
                    total / count * share,
                    "tokens/s",
                    f"the mean of all: {number(total / count)}",
                    share,
                    Aim(at_least=LEAST_SHARE),
                )
            )
    return {float(count): total for count, total in medians.items()}


def exactness(settings: Settings, report: Report, size: ModelSize, folder: pathlib.Path) -> None:
    """Greedy texts of sessions that decode together in float32, against transformers' float32."""
    count, tokens = settings.exact_sessions, settings.exact_tokens
    lengths = [SHORTEST + 5 * place for place in range(count - 1)] + [
        settings.longest_session - tokens
    ]
    report.say(f"{size.name}: {count} texts by transformers float32")
    rival = Transformers(folder, torch.float32)
    prompts = [token_ids(rival.model.config.vocab_size, length, seed=length) for length in lengths]
    expected = [rival.generate(prompt, tokens) for prompt in prompts]
    del rival
    gc.collect()
    report.say(f"{size.name}: the same by us, together")
    with Local(folder, FLOAT32, ends=True) as local:
        texts = texts_together(local, prompts, tokens)
    equal = sum(ours == theirs for ours, theirs in zip(texts, expected, strict=True))
    report.add(
        Row(
            f"{size.name} float32: exact texts of {count} sessions together",
            equal,
            f"texts of {tokens} tokens",
            f"transformers float32: {count}",
            equal / count,
            Aim(at_least=1.0),
        )
    )


def texts_together(local: Local, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The greedy texts behind ``prompts``; the sessions' rows go to the engine together."""
    sessions = [local.open(len(prompt) + tokens + 1) for prompt in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    outputs = [
        session.submit_tokens(prompt) for session, prompt in zip(sessions, prompts, strict=True)
    ]
    for _ in range(tokens):
        for session, text, output in zip(sessions, texts, outputs, strict=True):
            text.append(session.sample(output))
        outputs = [session.submit_next() for session in sessions]
    for output in outputs:
        output.result(DEADLINE)
    for session in sessions:
        session.close()
    return texts
