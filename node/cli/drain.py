"""``petals-node drain``: let the node of a data directory hand its sessions over, and leave."""

import contextlib
import signal
import sys
from pathlib import Path

import psutil

from ..config import default_data_dir
from . import failures, leaving
from .running import running_process

DEADLINE = 2 * leaving.GRACE
"""Seconds until a node that was told to leave is surely gone."""


def drain(data_dir: Path | None) -> int:
    """Tell the node, and wait until it is gone. Raises ConfigError if none runs there."""
    folder = default_data_dir() if data_dir is None else data_dir
    number = running_process(folder)
    with contextlib.suppress(psutil.NoSuchProcess):  # gone by itself, a moment ago
        process = psutil.Process(number)
        process.send_signal(signal.SIGTERM)
        sys.stderr.write(f"Process {number} hands its sessions over and leaves …\n")
        try:
            process.wait(DEADLINE)
        except psutil.TimeoutExpired:
            raise failures.CommandFailed(
                f"process {number} is still there after {DEADLINE:.0f} s"
            ) from None
    sys.stdout.write("The node has left the swarm.\n")
    return failures.OK
