"""``petals-node drain``: let the node of a data directory hand its sessions over, and leave."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from ...protocol.errors import ConfigError
from ..config import default_data_dir
from . import failures, leaving
from .running import running_process

DEADLINE = 2 * leaving.GRACE
"""Seconds until a node that was told to leave is surely gone."""
INTERVAL = 0.05


def drain(data_dir: Path | None) -> int:
    """Tell the node, and wait until it is gone. Raises ConfigError if none runs there."""
    folder = default_data_dir() if data_dir is None else data_dir
    process = running_process(folder)
    if process is None:
        raise ConfigError(
            f"data_dir: no node runs in {folder}; name the data directory that it was started with "
            "(--data-dir)"
        )
    try:
        with contextlib.suppress(ProcessLookupError):  # gone by itself, a moment ago
            os.kill(process, signal.SIGTERM)
    except PermissionError:
        raise failures.CommandFailed(
            f"process {process} is another user's: drain it as that user"
        ) from None
    sys.stderr.write(f"Process {process} hands its sessions over and leaves …\n")
    until = time.monotonic() + DEADLINE
    while running_process(folder) == process:
        if time.monotonic() > until:
            raise failures.CommandFailed(f"process {process} is still there")
        time.sleep(INTERVAL)
    sys.stdout.write("The node has left the swarm.\n")
    return failures.OK
