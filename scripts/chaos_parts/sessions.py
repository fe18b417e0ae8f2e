"""Sessions that write texts while the swarm is tormented, and what became of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio
from petals.node.generation import GenerationHandle
from petals.node.node import Node
from petals.protocol.errors import PetalsError

from .texts import Text

logger = logging.getLogger(__name__)

LOST_AFTER = 60.0
"""Seconds beyond its patience that one text may take; a session that has not ended then hangs."""
STALL = 1.0
"""Seconds without a token from which on a reader sees a pause, on a machine that is busy."""


@dataclass(frozen=True)
class Stall:
    """A pause between two tokens of a session that a reader notices."""

    end: float
    """In trio's time."""
    seconds: float


@dataclass
class Outcome:
    """What all sessions together have come to."""

    say: Callable[[str], None]
    sessions: int = 0
    """Those that have written their text to the end."""
    tokens: int = 0
    recoveries: int = 0
    wrong: int = 0
    """Tokens that are not the right ones."""
    lost: int = 0
    """Sessions that failed or hung."""
    waits: list[float] = field(default_factory=list)
    """Of each session, the longest time without a token, that before the first one included."""
    stalls: list[Stall] = field(default_factory=list)


def quantile(seconds: Sequence[float], share: float) -> float:
    """What ``share`` of all are no longer than; 0 if there are none."""
    return sorted(seconds)[math.ceil(share * len(seconds)) - 1] if seconds else 0.0


async def write_texts(
    node: Node, texts: Sequence[Text], outcome: Outcome, over: Callable[[], bool], first: int
) -> None:
    """One session after another, until it is ``over``."""
    number = first
    while not over():
        await write(node, texts[number % len(texts)], outcome)
        number += 1


async def write(node: Node, text: Text, outcome: Outcome) -> None:
    """One text in a session of its own."""
    handle = await node.submit(text.prompts, text.params)
    try:
        with trio.fail_after(node.config.patience + LOST_AFTER):
            await _watch(handle, outcome)
            results = await handle.results()
    except (PetalsError, trio.TooSlowError) as error:
        outcome.lost += 1
        reason = "it hangs" if isinstance(error, trio.TooSlowError) else str(error)
        outcome.say(f"LOST: {text.prompts} with {text.params} ({reason}); it was {handle.status()}")
        return
    finally:
        outcome.recoveries += handle.status().recoveries
        handle.cancel()
    outcome.sessions += 1
    for prompt, result, expected in zip(text.prompts, results, text.expected, strict=True):
        got = result.token_ids
        outcome.tokens += len(got)
        wrong = sum(one != other for one, other in zip(got, expected, strict=False))
        wrong += abs(len(got) - len(expected))
        if wrong:
            outcome.wrong += wrong
            outcome.say(
                f"WRONG: {prompt!r} of {len(text.prompts)} with {text.params}: expected "
                f"{expected}, got {got}; it was {handle.status()}"
            )


async def _watch(handle: GenerationHandle, outcome: Outcome) -> None:
    """Take the time between pieces of text, until the generation ends."""
    since, longest = trio.current_time(), 0.0
    async for _ in handle:
        now = trio.current_time()
        longest = max(longest, now - since)
        if now - since >= STALL:
            outcome.stalls.append(Stall(now, now - since))
            logger.info("a session stood still for %.2f s: %s", now - since, handle.status())
        since = now
    outcome.waits.append(longest)
