"""``scripts/bench swarm``: several processes on loopback, against one process without a network.

All swarms run at the same time and take turns with the single process; those whose turn it is not
only keep their connections alive.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial

import trio

from .local import AUTO, DEADLINE, Local, LocalSession, mode_label, token_ids
from .loopback_swarm import LoopbackSwarm, Written, loopback_swarm
from .models import ModelSize
from .report import Aim, Report, Row, number
from .settings import Settings, fits_memory

JUDGED = 3
"""Processes for which the aims are."""
SHARE_OF_ONE_PROCESS = 0.9
SESSIONS = 8
SHORT_PROMPT = 32
SECOND_BY_FIRST = 0.2
"""Of a first token's time behind a prompt that the swarm has seen, by that of one that it has not."""


def run(settings: Settings, report: Report, parts: Sequence[str] | None) -> None:
    """Every model that writes text."""
    if parts:
        raise SystemExit("--part: swarm has none")
    for size in settings.whole:
        if fits_memory(
            size.parameters * 2 * (len(settings.processes) + 2), f"{size.name} swarms", report
        ):
            trio.run(one_model, settings, report, size)


async def one_model(settings: Settings, report: Report, size: ModelSize) -> None:
    """Start everything, then measure."""
    folder = settings.folder(size, report)
    label = mode_label(size, folder, AUTO)
    async with AsyncExitStack() as stack:
        swarms: dict[int, LoopbackSwarm] = {}
        for processes in settings.processes:
            report.say(f"{label}: starting {processes} processes")
            starting = loopback_swarm(folder, processes, AUTO.dtype, among_them=True)
            swarms[processes] = await stack.enter_async_context(starting)
        local = stack.enter_context(Local(folder, AUTO, ends=True))
        prompts = Prompts(local.checkpoint.vocab_size)
        await one_session(settings, report, label, local, swarms, prompts)
        for processes, swarm in swarms.items():
            ours = f"{label}: {processes} process{'es' * (processes > 1)}"
            await many_sessions(settings, report, ours, swarm, prompts)
        await shared_prompt(settings, report, label, swarms[JUDGED], prompts)


class Prompts:
    """Prompts that nobody has seen before, so that nothing of them is kept anywhere."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._seeds = itertools.count(1)

    def new(self, length: int) -> list[int]:
        """Another one."""
        return token_ids(self._vocabulary, length, seed=next(self._seeds))


def write_locally(session: LocalSession, prompt: Sequence[int], tokens: int) -> Written:
    """What ``LoopbackSwarm.write`` does, in this process."""
    written = Written()
    session.length = 0
    output = session.submit_tokens(prompt)
    for _ in range(tokens):
        session.sample(output)
        written.times.append(time.perf_counter())
        output = session.submit_next()
    output.result(DEADLINE)
    return written


async def one_session(
    settings: Settings,
    report: Report,
    label: str,
    local: Local,
    swarms: dict[int, LoopbackSwarm],
    prompts: Prompts,
) -> None:
    """A text by one process and by each swarm, in turns."""
    length, tokens = settings.lengths[0], settings.swarm_tokens
    session = local.open(length + tokens + 1)
    samples: dict[int, list[Written]] = {processes: [] for processes in (0, *swarms)}
    for turn in range(settings.rounds + 1):
        for processes, taken in samples.items():
            prompt = prompts.new(length)
            if processes == 0:
                write = partial(write_locally, session, prompt, tokens)
                written = await trio.to_thread.run_sync(write)
            else:
                written = await swarms[processes].write(prompt, tokens)
            if turn:
                taken.append(written)
    session.close()
    token = {p: statistics.median(one.token for one in taken) for p, taken in samples.items()}
    first = {p: statistics.median(one.first_token for one in taken) for p, taken in samples.items()}
    for processes in swarms:
        name = f"{label}: {processes} process{'es' * (processes > 1)}, one session, KV {length}"
        report.ahead(
            name,
            1 / token[processes],
            "tokens/s",
            "one process without a network",
            1 / token[0],
            SHARE_OF_ONE_PROCESS if processes == JUDGED else None,
        )
        report.add(
            Row(
                f"{name}: what the network costs a token",
                (token[processes] - token[0]) * 1e3,
                "ms",
                f"{processes} one-way ways",
            )
        )
        report.add(
            Row(
                f"{name}: first token, route and prefill included",
                first[processes],
                "s",
                f"one process without a network: {number(first[0])}",
                first[0] / first[processes],
            )
        )


async def many_sessions(
    settings: Settings, report: Report, label: str, swarm: LoopbackSwarm, prompts: Prompts
) -> None:
    """Several sessions at once from one originator, against one."""
    alone: list[float] = []
    together: list[float] = []
    for turn in range(settings.rounds + 1):
        one = await swarm.write(prompts.new(SHORT_PROMPT), settings.swarm_tokens)
        several = await swarm.write_together(
            [prompts.new(SHORT_PROMPT) for _ in range(SESSIONS)], settings.swarm_tokens
        )
        if turn:
            alone.append(1 / one.token)
            together.append(sum(1 / each.token for each in several))
    report.ahead(
        f"{label}, {SESSIONS} sessions of one originator",
        statistics.median(together),
        "tokens/s in all",
        "one session alone",
        statistics.median(alone),
    )


async def shared_prompt(
    settings: Settings, report: Report, label: str, swarm: LoopbackSwarm, prompts: Prompts
) -> None:
    """The first token behind a prompt that is new, and behind the same once more."""
    firsts: list[float] = []
    seconds: list[float] = []
    for turn in range(settings.rounds + 1):
        prompt = prompts.new(settings.shared_prompt)
        first = await swarm.write(prompt, 2)
        second = await swarm.write(prompt, 2)
        if turn:
            firsts.append(first.first_token)
            seconds.append(second.first_token)
    again, new = statistics.median(seconds), statistics.median(firsts)
    report.add(
        Row(
            f"{label}: {JUDGED} processes, first token behind the same "
            f"{settings.shared_prompt} tokens once more",
            again,
            "s",
            f"the first time: {number(new)}",
            again / new,
            Aim(at_most=SECOND_BY_FIRST),
        )
    )
