"""Randomness as the pure parts see it: an argument, so that equal inputs give equal outputs."""

from typing import Protocol


class Dice(Protocol):
    """What ``random.Random`` is to ``protocol/``."""

    def random(self) -> float:
        """A number in [0, 1)."""
        ...


def pick(count: int, dice: Dice) -> int:
    """One of ``0, …, count - 1``, each as likely as the others."""
    return min(int(dice.random() * count), count - 1)
