"""How far a piece of work is that takes a while: told by who does it, to whoever shows it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """Where the work is now."""

    task: str
    """What is done, in words; the same for all steps of one piece of work."""
    done: float = 0
    total: float | None = None
    """None: nobody knows yet."""
    unit: str = ""
    """What is counted: ``bytes``, ``blocks``, ``tokens``."""


Progress = Callable[[Step], None]
"""Told from whatever thread does the work."""


def log(step: Step) -> None:
    """Tell it to the log, where nobody else listens."""
    if step.total is None:
        logger.info("%s", step.task)
    else:
        logger.info("%s: %g of %g %s", step.task, step.done, step.total, step.unit)
