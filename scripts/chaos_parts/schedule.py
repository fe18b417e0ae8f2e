"""Which fault hits whom, and when: drawn from a seed, so that a run can be had again.

The times and kinds of all faults follow from the seed alone. Whom a fault hits is drawn from the same
dice when its time comes, among the nodes that may be hurt: at least one other node must be whole for
each span, so that nobody can lose a session for want of machines.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

PAUSES = (2.0, 6.0)
"""Seconds between two faults: the least and the most."""


class Kind(StrEnum):
    """What is done to a node."""

    KILL = "kill"
    """SIGKILL; it is started again under its old key."""
    REPLACE = "replace"
    """SIGKILL; another node is started in its place."""
    HANG = "hang"
    """SIGSTOP, and SIGCONT some seconds later."""
    LEAVE = "leave"
    """SIGTERM; it is started again."""
    CUT = "cut"
    """All of its connections are reset."""
    OUTAGE = "outage"
    """The same, and for some seconds nobody gets through to it."""
    SILENCE = "silence"
    """For some seconds nothing passes to it, nor from it, on connections that it did not dial; then
    all of it does, as when a cable is pulled and put back."""
    DELAY = "delay"
    """What passes on those connections is late for some seconds."""
    NARROW = "narrow"
    """Little passes on them for some seconds."""


WEIGHTS = {
    Kind.KILL: 4,
    Kind.REPLACE: 2,
    Kind.HANG: 3,
    Kind.LEAVE: 2,
    Kind.CUT: 5,
    Kind.OUTAGE: 2,
    Kind.SILENCE: 2,
    Kind.DELAY: 2,
    Kind.NARROW: 1,
}
"""How often each comes, against the others."""
RANGES = {
    Kind.HANG: (3.0, 12.0),
    Kind.OUTAGE: (2.0, 8.0),
    Kind.SILENCE: (3.0, 12.0),
    Kind.DELAY: (2.0, 8.0),
    Kind.NARROW: (2.0, 8.0),
}
"""Seconds that those last which last."""
DELAYS = (0.02, 0.3)
"""Seconds one way."""
RATES = (20e3, 200e3)
"""Bytes a second each way: a row of the demo model is 1 KB, the prefix of a long session 300 KB."""


@dataclass(frozen=True)
class Fault:
    """One fault to come."""

    at: float
    """Seconds from the beginning."""
    kind: Kind
    seconds: float
    """How long it lasts; 0 if it is over at once."""
    delay: float = 0.0
    """One way."""
    rate: float = math.inf
    """Bytes a second each way."""


def schedule(seed: int, seconds: float) -> list[Fault]:
    """The faults of a run."""
    dice = random.Random(seed)
    faults: list[Fault] = []
    at = 0.0
    while True:
        at += dice.uniform(*PAUSES)
        kind = dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        lasting = dice.uniform(*RANGES.get(kind, (0.0, 0.0)))
        delay = dice.uniform(*DELAYS) if kind is Kind.DELAY else 0.0
        rate = dice.uniform(*RATES) if kind is Kind.NARROW else math.inf
        if at >= seconds:
            return faults
        faults.append(Fault(at, kind, lasting, delay, rate))


def may_be_hurt(spans: Mapping[str, str], whole: Sequence[str]) -> list[str]:
    """The whole nodes (of ``spans``: name to span) of whose span another one is whole, too."""
    return sorted(
        name
        for name in whole
        if any(other != name and spans[other] == spans[name] for other in whole)
    )
