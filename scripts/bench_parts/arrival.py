"""A long prompt that arrives while others decode: how long it makes them wait."""

from __future__ import annotations

import gc
import statistics
import time

from .driven import Driven, gaps, typical_gap
from .local import AUTO, Local, LocalSession, mode_label
from .report import Aim, Report, Row, number
from .settings import Settings
from .timing import Heartbeat

DECODING = 8
CONTEXT = 128
LONGEST_WAIT = 0.150
"""Seconds between two tokens, beside the step itself."""
BEFORE = 6
"""Tokens of every session before the prompt arrives, to know how long a step takes."""


def measure(settings: Settings, report: Report) -> None:
    """Every model that writes text; blocks only."""
    for size in settings.whole:
        folder = settings.folder(size, report)
        label = mode_label(size, folder, AUTO)
        with Local(folder, AUTO) as local:
            sessions = [local.open(CONTEXT + 2048) for _ in range(DECODING)]
            for session in sessions:
                session.fill(CONTEXT)
            arrival(local, sessions, settings.prompt)  # the first does not count
            with Heartbeat() as heartbeat:
                arrivals = [
                    arrival(local, sessions, settings.prompt) for _ in range(settings.rounds)
                ]
        gc.collect()
        longest = [worst for worst, _, _ in arrivals]
        step = statistics.median(step for _, step, _ in arrivals)
        bound = LONGEST_WAIT + step
        for name, value in (("median", statistics.median(longest)), ("worst", max(longest))):
            report.add(
                Row(
                    f"{label}: longest wait of {DECODING} decoding sessions while a prompt of "
                    f"{settings.prompt} tokens arrives, {name} of {len(longest)}",
                    value * 1e3,
                    "ms",
                    f"150 ms + a step of {number(step * 1e3)}: {number(bound * 1e3)}",
                    value / bound,
                    Aim(at_most=1.0),
                )
            )
        report.add(
            Row(
                f"{label}: meanwhile, the longest time for which the machine did not let us run",
                heartbeat.longest * 1e3,
                "ms",
                "waits of that length are not ours",
            )
        )
        seconds = statistics.median(taken for _, _, taken in arrivals)
        report.add(
            Row(
                f"{label}: prefill of {settings.prompt} tokens while {DECODING} sessions decode",
                settings.prompt / seconds,
                "tokens/s",
            )
        )


def arrival(local: Local, sessions: list[LocalSession], prompt: int) -> tuple[float, float, float]:
    """The longest wait of any session, a step without the prompt, and the prompt's time."""
    for session in sessions:
        session.length = CONTEXT
    driven = Driven(sessions)
    driven.start()
    driven.wait_until_each_has(BEFORE)
    newcomer = local.open(prompt)
    begin = time.perf_counter()
    seconds = newcomer.fill(prompt)
    driven.wait_until_each_has(max(map(len, driven.times)) + 2)
    driven.stop()
    driven.wait()
    newcomer.close()
    longest = max(max(gaps(times, begin)) for times in driven.times)
    return longest, typical_gap(driven.times, begin), seconds
