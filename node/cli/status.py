"""``petals-node status``: who serves which blocks of which model, once or as it changes.

What the swarm says is summed up (``node/summary.py``) in plain values, which ``--json`` writes as they
are and ``status_view.py`` draws. Where nobody looks (standard output is no terminal) a picture is written only
when something has changed.
"""

import json
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio

from ...protocol.announcement import as_model_name
from ...protocol.errors import PeerError
from ..config import NodeConfig
from ..summary import Models, summarise
from ..wakeup import open_flat_nursery
from . import failures, leaving, originator

INTERVAL = 2.0
"""Seconds between two looks. One costs the swarm a lookup, and each node shown a question."""
PIPE_WIDTH = 160
"""Columns where there is no terminal, so that no figure is cut off."""


def status(
    config: NodeConfig, *, model: str | None, json_result: bool, watch: bool, exit_with_stdin: bool
) -> int:
    """Ask the swarm and show what it says, of one model or of all; with ``watch`` until Ctrl-C."""
    if exit_with_stdin:
        leaving.leave_when_stdin_ends()
    name = None
    if model is not None:
        path = Path(model)
        name = as_model_name(path.name if path.is_dir() else model)
    write = _write_json if json_result else _write_picture
    if not watch:
        write(trio.run(_ask, config, name))
    elif json_result or not sys.stdout.isatty():
        trio.run(_until_told_to_leave, partial(_watch, config, name, _Changes(write).show))
    else:
        _watch_in_terminal(config, name)
    return failures.OK


# --- once -----------------------------------------------------------------------------------------


async def _ask(config: NodeConfig, name: str | None) -> Models:
    from ..node import Node

    async with Node(config) as node:
        return summarise(await node.swarm_view(name))


def _write_json(models: Models) -> None:
    sys.stdout.write(json.dumps({"models": models}) + "\n")
    sys.stdout.flush()


def _write_picture(models: Models) -> None:
    from rich.console import Console

    from .status_view import picture

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(picture(models, console.width))


# --- as it changes --------------------------------------------------------------------------------

Show = Callable[[Models, str | None], None]
"""Shows the models, and why the swarm could not be asked since, if it could not."""


class _Changes:
    """Writes what differs from what was written before."""

    def __init__(self, write: Callable[[Models], None]) -> None:
        self._write = write
        self._written: Models | None = None
        self._told: str | None = None

    def show(self, models: Models, trouble: str | None) -> None:
        """Write the models if they are news; a trouble is for standard error, once."""
        if trouble is not None and self._told is None:
            originator.note(trouble)
        self._told = trouble
        if models != self._written:
            self._written = models
            self._write(models)


async def _watch(config: NodeConfig, name: str | None, show: Show) -> None:
    from ..node import Node

    async with Node(config) as node:
        models: Models = summarise(await node.swarm_view(name))
        trouble = None
        while True:
            show(models, trouble)
            await trio.sleep(INTERVAL)
            try:
                models, trouble = summarise(await node.swarm_view(name)), None
            except PeerError as error:
                trouble = f"The swarm cannot be asked; trying again. ({error})"


async def _until_told_to_leave(action: Callable[[], Awaitable[None]]) -> None:
    async with open_flat_nursery() as nursery:

        async def leave(task_status: trio.TaskStatus[None]) -> None:
            await leaving.wait_until_told_to_leave(task_status=task_status)
            nursery.cancel_scope.cancel()

        await nursery.start(leave)
        await action()


def _watch_in_terminal(config: NodeConfig, name: str | None) -> None:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from .status_view import picture

    console = Console()

    def show(models: Models, trouble: str | None) -> None:
        foot = trouble or f"every {INTERVAL:g} s; Ctrl-C ends"
        style = "dim" if trouble is None else "red"
        live.update(Group(picture(models, console.width), Text(foot, style=style)), refresh=True)

    with Live(console=console, auto_refresh=False) as live:
        trio.run(_until_told_to_leave, partial(_watch, config, name, show))
