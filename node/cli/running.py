"""Which process runs the node of a data directory: a file that is locked while it does.

The lock is the kernel's, so that a node that was killed leaves none behind, whatever the file says.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ...protocol.errors import ConfigError

PID_FILE = "node.pid"


@contextlib.contextmanager
def running_in(data_dir: Path) -> Iterator[None]:
    """Be the node of ``data_dir`` meanwhile. Raises ConfigError if there is one already."""
    with _opened(data_dir, os.O_RDWR | os.O_CREAT) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"data_dir: a node runs in {data_dir} already (process {_read(file)}); give this one "
                "a --data-dir of its own, or end the other with `petals-node drain`"
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield  # what the file says stays: only the lock tells whether that is so


def running_process(data_dir: Path) -> int | None:
    """The process of the node that runs in ``data_dir``, if there is one.

    Raises ConfigError if that cannot be told.
    """
    if not (data_dir / PID_FILE).exists():
        return None
    with _opened(data_dir, os.O_RDWR) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = _read(file)
            if text.isdecimal():
                return int(text)
            raise ConfigError(f"data_dir: the node in {data_dir} is just starting") from None
        return None


@contextlib.contextmanager
def _opened(data_dir: Path, flags: int) -> Iterator[int]:
    path = data_dir / PID_FILE
    try:
        file = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"data_dir: cannot use {path}: {error.strerror}") from error
    try:
        yield file
    finally:
        os.close(file)


def _read(file: int) -> str:
    return os.pread(file, 32, 0).decode("ascii", errors="replace")
