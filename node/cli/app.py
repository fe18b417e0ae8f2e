"""The command line: which commands there are, and how a command's end becomes an exit code.

Rules of this file: it only assembles and dispatches. The commands and their options are declared in
one file per group, arguments are checked in ``arguments.py``; the work is in one file per command,
which is imported when its command runs, so that ``--help`` and bad input never wait for torch.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from . import failures, giving, logs, looking, using
from .command import DebugOption, Group, in_markup

PANELS = {
    "See what it is": (looking.demo_command,),
    "Use a swarm": (
        using.generate_command,
        using.chat_command,
        using.api_command,
        looking.status_command,
    ),
    "Give a machine": (
        giving.run_command,
        giving.seed_command,
        giving.drain_command,
        giving.swarm_key_command,
    ),
    "When something is wrong": (looking.doctor_command,),
    None: (looking.reference_command,),
}
"""The commands by the panels of the help, in the order in which one meets them; None hides."""

app = typer.Typer(
    name="petals-node",
    cls=Group,
    help="Run a language model on a swarm of machines, none of which could hold it alone.\n\n"
    "Every option of a command can be set in three places: as --num-blocks 4 on the command line, "
    "else as PETALS_NUM_BLOCKS=4 in the environment, else as num-blocks = 4 in a file of settings "
    "(--config). Several values: separated by spaces in the environment, a list in the file.",
    epilog=in_markup(
        [
            ("See a whole swarm on this machine", "petals-node demo"),
            ("Begin one of your own; it says how others join", "petals-node run --model demo"),
            ("Write with a swarm of the local network", 'petals-node generate --mdns "The king"'),
            ("All about one command", "petals-node run --help"),
        ]
    ),
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _panel, _commands in PANELS.items():
    for _command in _commands:
        _command.add_to(app, _panel)


def _show_version(*, wanted: bool) -> None:
    if wanted:
        from ... import __version__

        typer.echo(f"petals-node {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=lambda wanted: _show_version(wanted=wanted),
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """See ``app``."""
    del version, debug  # their callbacks have acted


def run_command_line(argv: Sequence[str]) -> int:
    """Run one command and return the exit code of the process; never raises, never a traceback.

    With --debug the traceback is shown as well.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a token's letters
    try:
        result = app(list(argv) or ["--help"], prog_name="petals-node", standalone_mode=False)
    except typer.TyperException as error:
        return _complain(error.exit_code, f"{error.format_message()} (--help shows the options)")
    except SystemExit as error:  # the completion of a shell ends like this
        return error.code if isinstance(error.code, int) else failures.OK
    except BaseException as error:  # noqa: BLE001 - the last border: everything becomes a line
        if failures.is_broken_pipe(error):
            # Say nothing more, also not when the interpreter flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return failures.FAILED
        if failures.debugging():
            sys.stderr.write(failures.traceback_of(error))
        return _complain(*failures.explain(error))
    return result if isinstance(result, int) else failures.OK


def _complain(code: int, line: str) -> int:
    sys.stdout.flush()
    logs.complain(line)
    return code
