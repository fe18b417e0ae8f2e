"""Bars for people who wait: what is done, how far, how fast, and how long still.

Rules of this file: bars are drawn on standard error, and only where that is a terminal; they are gone
when the work is done. What ends within a second shows none.
"""

import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

import trio

from ...inference.progress import Progress, Step
from ..wakeup import open_flat_nursery

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

SHOW_AFTER = 1.0
"""Seconds from the first step of anything: most of it is over by then."""
LOOK_INTERVAL = 0.1


@contextlib.contextmanager
def shown() -> Iterator[Progress | None]:
    """Draw what the block tells to what it gets, until the block ends; None where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    drawn = _Drawn()
    try:
        yield drawn.tell
    finally:
        drawn.end()


@contextlib.asynccontextmanager
async def watching(look: Callable[[], Step]) -> AsyncIterator[Callable[[], None]]:
    """Draw what ``look`` says, again and again, until the block ends or calls what it gets.

    It has to before it writes anything of its own.
    """

    async def watch(tell: Progress) -> None:
        while True:
            tell(look())
            await trio.sleep(LOOK_INTERVAL)

    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(shown())
        async with open_flat_nursery() as nursery:
            if tell is not None:
                nursery.start_soon(watch, tell)
            yield stack.close
            nursery.cancel_scope.cancel()


class _Drawn:
    """The bars on the terminal, made when the first is worth it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._ended = False

    def tell(self, step: Step) -> None:
        with self._lock:
            if self._ended or (self._bars is None and time.monotonic() - self._begun < SHOW_AFTER):
                return
            if self._bars is None:
                self._bars = _bars()
                self._bars.start()
            task = self._tasks.get(step.task)
            if task is None:
                for other in self._bars.tasks:
                    self._bars.update(other.id, visible=not other.finished)
                task = self._tasks[step.task] = self._bars.add_task(
                    step.task, total=step.total, unit=step.unit
                )
            self._bars.update(task, completed=step.done, total=step.total)

    def end(self) -> None:
        with self._lock:
            self._ended = True
            if self._bars is not None:
                self._bars.stop()
                self._bars = None


def _bars() -> "Bars":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Counted(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(amounts(task.completed, task.total, task.speed, str(task.fields["unit"])))

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        Counted(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
    )


def amounts(done: float, total: float | None, speed: float | None, unit: str) -> str:
    """How far and how fast, in words."""
    if not unit:
        return ""
    scale, name = 1.0, unit
    if unit == "bytes":
        scale, name = (1e9, "GB") if (total or done) >= 1e9 else (1e6, "MB")
    digits = 1 if unit == "bytes" else 0
    far = f"{done / scale:.{digits}f}"
    if total is not None:
        far += f" of {total / scale:.{digits}f}"
    if not speed:
        return f"{far} {name}"
    rate = f"{speed / 1e6:.1f} MB/s" if unit == "bytes" else f"{speed:.1f}/s"
    return f"{far} {name}, {rate}"
