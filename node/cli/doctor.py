"""``petals-node doctor``: what is wrong with this machine, these settings and this way into a swarm.

It takes the settings of ``run``, and looks at whatever such a node would need. Exit code 0: a node
would work; 1: there is something to mend.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from ...protocol.announcement import Announcement
from ...protocol.errors import ConfigError
from ..config import NodeConfig
from . import failures, machine
from .findings import Finding, State, bad, good

Show = Callable[[Finding], None]


def doctor(
    file: Path,
    trouble: ConfigError | None,
    make_config: Callable[[], NodeConfig],
    *,
    json_result: bool,
) -> int:
    """Examine everything and say it; ``file`` is that of the settings, ``trouble`` what it lacks."""
    found: list[Finding] = []
    show = _ignore if json_result else _in_words(sys.stdout.isatty())

    def find(finding: Finding) -> None:
        found.append(finding)
        show(finding)

    _examine(file, trouble, make_config, find)
    broken = [finding for finding in found if finding.state is State.BAD]
    if json_result:
        record = {"ok": not broken, "findings": [dataclasses.asdict(one) for one in found]}
        sys.stdout.write(json.dumps(record) + "\n")
    else:
        mend = ", ".join(finding.subject for finding in broken)
        sys.stdout.write(f"\nTo mend: {mend}.\n" if broken else "\nA node would work here.\n")
    return failures.FAILED if broken else failures.OK


def _examine(
    file: Path,
    trouble: ConfigError | None,
    make_config: Callable[[], NodeConfig],
    find: Show,
) -> None:
    find(machine.versions())
    settled = False
    try:
        if trouble is not None:
            raise trouble
        config = make_config()
    except ConfigError as error:
        find(bad("settings", str(error), f"mend that in {file}, or where it says"))
        config = NodeConfig(bootstrap=(), swarm_key=None)
    else:
        settled = True
        said = f"from {file}" if file.exists() else f"no file of settings, which would be {file}"
        find(good("settings", said))
    build = machine.torch_build(config.device)
    find(build)
    places = [*machine.data_directory(config), *machine.ports(config)]
    for finding in places:
        find(finding)
    if build.state is State.BAD:
        return
    # The port of a node that runs already is not ours.
    listening = all(finding.state is State.GOOD for finding in places)
    find(machine.kernels())
    find(machine.memory(config))
    if settled:
        for finding in _in_the_swarm(config, listening=listening):
            find(finding)


def _in_the_swarm(config: NodeConfig, *, listening: bool) -> Iterator[Finding]:
    from . import outlook

    peers: list[Announcement] = []
    with TemporaryDirectory(prefix="petals-doctor-") as folder:
        yield from trio.run(partial(_gather, config, Path(folder), peers, listening=listening))
    yield from outlook.serving(config, peers)


async def _gather(
    config: NodeConfig, folder: Path, peers: list[Announcement], *, listening: bool
) -> list[Finding]:
    from . import outlook

    return [finding async for finding in outlook.swarm(config, folder, peers, listening=listening)]


def _ignore(finding: Finding) -> None:
    del finding


def _in_words(terminal: bool) -> Show:  # noqa: FBT001
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    marks = {State.GOOD: ("✓", "green"), State.NOTE: ("!", "yellow"), State.BAD: ("✗", "bold red")}
    console = Console(highlight=False, soft_wrap=not terminal)

    def show(finding: Finding) -> None:
        mark, style = marks[finding.state]
        line = Text.assemble((mark, style), " ", (f"{finding.subject}: ", "bold"), finding.says)
        console.print(line)
        if finding.advice is not None:
            console.print(Padding(Text.assemble(("→ ", style), finding.advice), (0, 0, 0, 2)))

    return show
