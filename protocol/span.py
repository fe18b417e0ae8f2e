"""Spans of transformer blocks: half-open ranges of block numbers, and what several of them cover."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The blocks ``start, …, end - 1`` of a model; never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(
                f"a span needs 0 <= start < end, got {self.start}:{self.end} "
                "(START is the first block, END the one after the last)"
            )

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.end

    def covers(self, other: "Span") -> bool:
        """Whether every block of ``other`` is in this span."""
        return self.start <= other.start and other.end <= self.end

    def intersection(self, other: "Span") -> "Span | None":
        """The blocks in both spans, or None."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Span(start, end) if start < end else None

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Read ``START:END``, as on the command line. Raises ValueError with what is allowed."""
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", text)
        if match is None:
            raise ValueError(f"{text!r} is not a range of blocks; write START:END, such as 0:8")
        return cls(int(match[1]), int(match[2]))


def coverage(spans: Iterable[Span], num_blocks: int) -> list[int]:
    """How many of ``spans`` hold each block of a model with ``num_blocks`` blocks."""
    changes = [0] * (num_blocks + 1)
    for span in spans:
        changes[min(span.start, num_blocks)] += 1
        changes[min(span.end, num_blocks)] -= 1
    counts, running = [], 0
    for change in changes[:num_blocks]:
        running += change
        counts.append(running)
    return counts


def gaps(spans: Iterable[Span], num_blocks: int) -> list[Span]:
    """The maximal runs of blocks that none of ``spans`` holds, in order."""
    missing: list[Span] = []
    start: int | None = None
    for block, count in enumerate([*coverage(spans, num_blocks), 1]):
        if count == 0 and start is None:
            start = block
        elif count > 0 and start is not None:
            missing.append(Span(start, block))
            start = None
    return missing
