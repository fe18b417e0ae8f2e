"""What an examination finds: how it is, and what to do about it."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How good or bad that is."""

    GOOD = "good"
    NOTE = "note"
    """It works, and could be better; or it could not be told."""
    BAD = "bad"
    """A node does not work like this."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    state: State
    says: str
    advice: str | None = None
    """What to do, where something can be done."""


def good(subject: str, says: str) -> Finding:
    """All is well."""
    return Finding(subject, State.GOOD, says)


def note(subject: str, says: str, advice: str | None = None) -> Finding:
    """Something to know."""
    return Finding(subject, State.NOTE, says, advice)


def bad(subject: str, says: str, advice: str | None = None) -> Finding:
    """Something to mend."""
    return Finding(subject, State.BAD, says, advice)
