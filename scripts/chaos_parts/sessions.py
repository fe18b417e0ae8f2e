"""Sessions that write texts while the swarm is tormented, and what became of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio
from petals.node.node import Node
from petals.node.originate import GenerationHandle
from petals.protocol.errors import PetalsError

from .texts import Text

logger = logging.getLogger(__name__)

LOST_AFTER = 240.0
"""Seconds that one text may take; a session that has not ended then hangs."""
STALL = 0.5
"""Seconds between two tokens from which on a reader sees a pause."""


@dataclass(frozen=True)
class Stall:
    """A pause between two tokens of a session that a reader notices."""

    end: float
    """In trio's time."""
    seconds: float


@dataclass
class Outcome:
    """What all sessions together have come to."""

    sessions: int = 0
    tokens: int = 0
    recoveries: int = 0
    wrong: int = 0
    """Tokens that are not the right ones."""
    lost: int = 0
    """Sessions that failed or hung."""
    stalls: list[Stall] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def stall(self, share: float) -> float:
        """The stall that ``share`` of all stalls are no longer than; 0 if there was none."""
        seconds = sorted(stall.seconds for stall in self.stalls)
        return seconds[math.ceil(share * len(seconds)) - 1] if seconds else 0.0


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
        with trio.fail_after(LOST_AFTER):
            await _watch(handle, outcome)
            results = await handle.results()
    except (PetalsError, trio.TooSlowError) as error:
        outcome.lost += 1
        reason = "it hangs" if isinstance(error, trio.TooSlowError) else str(error)
        outcome.complaints.append(f"lost: {text.prompts} ({reason}); it was {handle.status()}")
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
            outcome.complaints.append(
                f"wrong: {prompt!r} with {text.params}: expected {expected}, got {got}"
            )


async def _watch(handle: GenerationHandle, outcome: Outcome) -> None:
    """Take the time between pieces of text, until the generation ends."""
    since = None
    async for _ in handle:
        now = trio.current_time()
        if since is not None and now - since >= STALL:
            outcome.stalls.append(Stall(now, now - since))
            logger.info("a session stood still for %.2f s: %s", now - since, handle.status())
        since = now
