"""How a process of ours comes to its end: signals, a parent that has gone, and a bound in time.

Rules of this file: every way out goes through one of the signals in ``LEAVE``, and leaving takes
no longer than ``GRACE`` seconds whatever a model is computing at that moment.
"""

import os
import signal
import threading
from types import FrameType
from typing import NoReturn

import trio

LEAVE = frozenset({signal.SIGINT, signal.SIGTERM})

GRACE = 4.3
"""Seconds: a node is gone within 5 s of being told to leave."""


class Leaving(BaseException):
    """We were told to leave before there was anything to leave. Like KeyboardInterrupt, no error."""


def leave_at_signals_while_starting() -> None:
    """Until the event loop listens for signals itself, let them raise ``Leaving``."""
    for number in LEAVE:
        signal.signal(number, _raise_leaving)


def _raise_leaving(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise Leaving


async def wait_until_told_to_leave(
    *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Return at the first signal to leave; a second one ends the process on the spot.

    Started once signals are listened for: those that come while modules are imported wait.
    """
    with trio.open_signal_receiver(*LEAVE) as signals:
        task_status.started()
        async for _ in signals:
            break
    for number in LEAVE:
        signal.signal(number, lambda *_: os._exit(1))


def leave_by_force_after(seconds: float) -> None:
    """End the process with code 0 when ``seconds`` have passed.

    A forward pass cannot be interrupted, and on a large span it may take longer than we may.
    """
    timer = threading.Timer(seconds, os._exit, args=(0,))
    timer.daemon = True
    timer.start()


def leave_when_stdin_ends() -> None:
    """Leave when whoever holds the other end of our standard input has gone, however it went."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin watch", daemon=True).start()
