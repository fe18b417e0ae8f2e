"""Whose turn it is to compute, among the nodes of a machine that share its cores.

An operation of torch, or of our own kernels, is spread over all cores and ends with the last of its threads. Two
processes that compute at once take the cores from each other in the middle of every operation, and then each
waits for a thread that does not run: three nodes on two cores, two sessions through all of them, took four times
as long for a round as one alone, and both sessions together wrote half of what one did. So such nodes take
turns, each as long as a round, or as the head and the sampling of a token. Steps that come while a node
waits are in its next round.

A turn is a lock on a file (flock), which the system takes back however its holder ends. A second file is locked by
who is next: nobody who has just had a turn is before them.

Rules of this file: nobody depends on another node. One that is stopped, or computes for long, is waited for for
``PATIENCE`` seconds, and then for a while not at all. Nodes that do not share cores do not wait for each other:
the files are those of the cores that a process may run on, and a process that uses half of them at most
(``OMP_NUM_THREADS``) takes no turns.
"""

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

PATIENCE = 0.5
"""Seconds; rounds last a tenth of one, or as long as a round of single rows where that is more."""
LONGEST_WITHOUT = 30.0
"""Seconds for which nobody waits for a turn once PATIENCE has been in vain; at first, PATIENCE."""
_POLL = 0.0002
_POLL_BEHIND = 0.001
"""Seconds between two looks of who is next, and of those behind; the lock itself cannot be waited for with
an end."""


class Cores:
    """The cores that this process computes on, for one thread of it."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``folder`` is the nodes' own, on this machine; None: one for each user."""
        self._folder = folder
        self._patience = patience
        self._clock = clock
        self._files: tuple[FileIO, FileIO] | None = None
        """Who is next, and whose turn it is; None: there are no turns, or not yet."""
        self._opened = False
        self._without = patience
        self._without_until = -1.0

    def run(self, function: Callable[[], T]) -> T:
        """What ``function`` returns or raises, in a turn."""
        with self.alone():
            return function()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A turn, or after ``patience`` none; not twice at once."""
        if not self._opened:
            self._opened, self._files = True, self._open()
        if self._files is None:
            yield
            return
        following, turn = self._files
        taken = self._take(following, turn)
        try:
            yield
        finally:
            if taken:
                fcntl.flock(turn, fcntl.LOCK_UN)

    def close(self) -> None:
        """Take no more turns."""
        for file in self._files or ():
            file.close()
        self._opened, self._files = True, None

    def _take(self, following: FileIO, turn: FileIO) -> bool:
        now = self._clock()
        end = now if now < self._without_until else now + self._patience
        if self._lock(following, end, _POLL_BEHIND):
            taken = self._lock(turn, end, _POLL)
            fcntl.flock(following, fcntl.LOCK_UN)
            if taken:
                self._without = self._patience
                return True
        if end > now:
            logger.info(
                "another node of this machine has not computed to the end; going on beside it"
            )
            self._without_until = self._clock() + self._without
            self._without = min(2 * self._without, LONGEST_WITHOUT)
        return False

    def _lock(self, file: FileIO, end: float, poll: float) -> bool:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if self._clock() >= end:
                    return False
                time.sleep(poll)
            else:
                return True

    def _open(self) -> tuple[FileIO, FileIO] | None:
        import torch  # here: importing torch_thread.py imports none

        cores = usable_cores()
        if 2 * torch.get_num_threads() <= len(cores):
            return None
        name = f"cores-{sum(1 << core for core in cores):x}"
        with contextlib.ExitStack() as opened:
            try:
                folder = self._folder or _folder_of_user()
                following, turn = (
                    opened.enter_context(FileIO(folder / f"{name}.{part}", "a"))
                    for part in ("next", "turn")
                )
                for file in (following, turn):
                    fcntl.flock(file, fcntl.LOCK_UN)  # some file systems have no locks
            except OSError as error:
                logger.info("no turns with other nodes of this machine: %s", error)
                return None
            opened.pop_all()
            return following, turn


def usable_cores() -> set[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _folder_of_user() -> Path:
    """On the machine's own disk, where a home may be on a network's. Raises OSError."""
    folder = Path(tempfile.gettempdir(), f"petals-node-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is somebody else's")
    return folder
