"""How a command ends: which exit code an error gives, and the one line that says why.

Exit codes: 0 done; 1 it began and failed, or there is a bug; 2 what was asked for cannot be
(a wrong argument, a model that is not there, a swarm that does not answer); 130 interrupted.
"""

import os
import traceback
from collections.abc import Iterator

from ...protocol.errors import (
    CacheFull,
    ConfigError,
    ModelError,
    ModelMismatch,
    NoRoute,
    PeerError,
    PetalsError,
)

OK = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

DEBUG_VARIABLE = "PETALS_DEBUG"

_CANNOT_BE = (CacheFull, ConfigError, ModelError, ModelMismatch, NoRoute, PeerError)


class CommandFailed(PetalsError):
    """A command began its work, showed some of it, and could not finish."""


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def debug() -> None:
    """Want them, in this process and in those that it starts."""
    os.environ[DEBUG_VARIABLE] = "1"


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for ``error``, which may be a group of errors.

    Of a group, whoever interrupted comes first, then what we raise on purpose: the rest is usually
    its consequence.
    """
    leaves = list(_leaves(error))
    for leaf in leaves:
        if isinstance(leaf, KeyboardInterrupt):
            return INTERRUPTED, "interrupted"
    for leaf in leaves:
        if isinstance(leaf, PetalsError):
            return (BAD_INPUT if isinstance(leaf, _CANNOT_BE) else FAILED), _one_line(leaf)
    leaf = leaves[0]
    return FAILED, (
        f"{type(leaf).__name__}: {_one_line(leaf)} (this should not happen; with "
        f"{DEBUG_VARIABLE}=1 you get the traceback that a bug report needs)"
    )


def is_broken_pipe(error: BaseException) -> bool:
    """Whether whoever read our output has gone."""
    return any(isinstance(leaf, BrokenPipeError) for leaf in _leaves(error))


def traceback_of(error: BaseException) -> str:
    """The whole traceback, for those who asked for it."""
    return "".join(traceback.format_exception(error))


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
