"""Two sessions with the same long prompt: what the second one gains, at one node."""

from __future__ import annotations

import gc
import hashlib
import statistics
import time
from collections.abc import Sequence

from petals.protocol.prefix import PREFIX_ROWS, Label, last_boundary

from .local import AUTO, DEADLINE, Local, mode_label, token_ids
from .report import Aim, Report, Row, number
from .settings import Settings

SECOND_BY_FIRST = 0.2
"""Of the second session's time to its first token, by the first session's."""


def measure(settings: Settings, report: Report) -> None:
    """Every model that writes text, embedding and head included."""
    for size in settings.whole:
        folder = settings.folder(size, report)
        label = mode_label(size, folder, AUTO)
        firsts: list[float] = []
        seconds: list[float] = []
        same = 0
        with Local(folder, AUTO, ends=True) as local:
            for turn in range(settings.rounds + 1):
                prompt = token_ids(local.checkpoint.vocab_size, settings.shared_prompt, seed=turn)
                first, text = first_token(local, prompt)
                second, again = first_token(local, prompt)
                same += text == again
                if turn:
                    firsts.append(first)
                    seconds.append(second)
        gc.collect()
        new, known = statistics.median(firsts), statistics.median(seconds)
        report.add(
            Row(
                f"{label}: first token of a second session with the same {settings.shared_prompt} "
                "tokens",
                known,
                "s",
                f"of the first session: {number(new)}",
                known / new,
                Aim(at_most=SECOND_BY_FIRST),
            )
        )
        report.add(
            Row(
                f"{label}: the second session's token is the first one's",
                same,
                "times",
                f"sessions: {settings.rounds + 1}",
                same / (settings.rounds + 1),
                Aim(at_least=1.0),
            )
        )


def first_token(local: Local, prompt: Sequence[int]) -> tuple[float, int]:
    """Seconds to the first token of a new session, what is known of it restored; the token."""
    keys = keys_of(prompt)
    begin = time.perf_counter()
    session = local.open(len(prompt) + 1, prefixes=True)
    restored = local.engine.restore(
        session.session_id,
        [key for _, key in keys],
        wire_dtype=local.wire_dtype,
        span=local.span,
    ).result(DEADLINE)
    session.length = restored.position
    token = session.sample(session.submit_tokens(prompt[restored.position :], keys))
    seconds = time.perf_counter() - begin
    session.close()
    return seconds, token


def keys_of(prompt: Sequence[int]) -> list[Label]:
    """A name for the prompt up to each boundary, as hops would agree on one."""
    boundaries = range(PREFIX_ROWS, last_boundary(len(prompt)) + 1, PREFIX_ROWS)
    return [(end, hashlib.sha256(repr(prompt[:end]).encode()).digest()) for end in boundaries]
