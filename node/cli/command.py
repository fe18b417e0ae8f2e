"""What all commands have in common: options, and the three places that an option is read from.

An option is declared once, as an argument of its command's function. Its name gives the other two:
``--num-blocks`` is ``PETALS_NUM_BLOCKS`` in the environment and ``num-blocks`` in the file of
settings. The command line goes before the environment, that before the file, and that before the
default. A complaint about a value says where it came from, if it was not typed.
"""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from ...protocol.errors import ConfigError
from . import failures, logs, settings

PREFIX = "PETALS_"
COMMON = "Every command"
"""The panel of the options that are in every command."""

_NAMED = re.compile(r"(?:--)?([a-z][a-z0-9_-]*)\b")
"""The option that a complaint is about stands at its beginning."""


class Group(TyperGroup):
    """All commands together."""

    def get_params(self, ctx: Any) -> list[Any]:
        """See typer's."""
        return _tidy(super().get_params(ctx))


class Command(TyperCommand):
    """A command whose options can also be set in the environment and in the file."""

    stands_for: str | None = None
    """The command that it tells about: that one's settings are its own, too."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        for option in self._options():
            option.envvar = variable_of(option)
            option.show_envvar = False  # said once for all, in the help of the whole

    @property
    def settings(self) -> dict[str, TyperOption]:
        """By their keys, the options that the file may set."""
        options = ((key_of(option), option) for option in self._options())
        return {key: option for key, option in options if key != "config" and not option.hidden}

    def get_params(self, ctx: Any) -> list[Any]:
        """See typer's."""
        return _tidy(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See typer's."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message += _whence(ctx, error.param) if error.param is not None else ""
            raise

    def invoke(self, ctx: Any) -> Any:
        """See typer's."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            named = _NAMED.match(str(error))
            option = self.settings.get(named[1].replace("_", "-")) if named is not None else None
            if option is None or not (whence := _whence(ctx, option)):
                raise
            raise ConfigError(f"{error}{whence}") from error

    def _options(self) -> list[TyperOption]:
        return [option for option in self.params if isinstance(option, TyperOption)]


class Examination(Command):
    """A command that tells what is wrong, with the settings of ``run``, and so has to start."""

    stands_for = "run"


def _tidy(parameters: list[Any]) -> list[Any]:
    """Show no type for options that are just there or not, and ``--help`` with its like."""
    for option in parameters:
        if isinstance(option, TyperOption) and option.is_flag:
            option.metavar = ""
            if option.name == "help":
                option.rich_help_panel = COMMON
    return parameters


def key_of(option: TyperOption) -> str:
    """What the option is called in the file of settings."""
    return option.opts[0].removeprefix("--")


def variable_of(option: TyperOption) -> str:
    """What the option is called in the environment."""
    return PREFIX + key_of(option).replace("-", "_").upper()


def _whence(ctx: Any, option: Any) -> str:
    """Where the value of the option was found, in words; nothing if it was typed."""
    source = ctx.get_parameter_source(option.name)
    if source is None or source.name not in ("ENVIRONMENT", "DEFAULT_MAP"):
        return ""
    return f" (set by {option.envvar if source.name == 'ENVIRONMENT' else ctx.meta[_FILE]})"


# --- the options of every command -----------------------------------------------------------------

_FILE = "petals.settings_file"
"""Where the context keeps which file was read."""
_TROUBLE = "petals.settings_trouble"
"""And what was wrong with it, for commands that start all the same."""


def _read_settings(ctx: typer.Context, given: Path | None) -> Path:
    """Let the command's other options default to what the file says; returns which file that is."""
    path = settings.default_file() if given is None else given
    if ctx.resilient_parsing:
        return path
    group, command = ctx.find_root().command, ctx.command
    assert isinstance(group, TyperGroup)
    assert isinstance(command, Command)
    others = [other for other in group.commands.values() if isinstance(other, Command)]
    options = {str(other.name): frozenset(other.settings) for other in others if not other.hidden}
    ctx.meta[_FILE] = path
    try:
        chosen = settings.read(path, options, must_exist=given is not None)
    except ConfigError as error:
        if command.stands_for is None:
            raise
        ctx.meta[_TROUBLE] = error
        return path
    ctx.default_map = {}
    for key, option in command.settings.items():
        tables = [str(command.name)]
        if command.stands_for is not None and key != "json":  # how it answers is its own affair
            tables.append(command.stands_for)
        if (value := chosen.value(tables, key)) is not None:
            one = option.multiple and isinstance(value, str)
            ctx.default_map[option.name] = [value] if one else value
    return path


def settings_file(ctx: typer.Context) -> Path:
    """Which file of settings a command looks at."""
    file: Path = ctx.meta[_FILE]
    return file


def settings_trouble(ctx: typer.Context) -> ConfigError | None:
    """What is wrong with it, if the command starts all the same."""
    trouble: ConfigError | None = ctx.meta.get(_TROUBLE)
    return trouble


def _debug(*, wanted: bool) -> None:
    if wanted:
        failures.debug()


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        callback=_read_settings,
        is_eager=True,  # before the options that it sets
        help=f"TOML file of settings. Default: {settings.default_file()}, if it is there.",
        rich_help_panel=COMMON,
    ),
]
LogLevelOption = Annotated[
    str,
    typer.Option(
        "--log-level",
        metavar="LEVEL",
        help=f"{', '.join(logs.LEVELS[:-1])} or {logs.LEVELS[-1]}: the least that is logged, to "
        "standard error.",
        autocompletion=lambda: list(logs.LEVELS),
        rich_help_panel=COMMON,
    ),
]
LogFormatOption = Annotated[
    str,
    typer.Option(
        "--log-format",
        metavar="FORMAT",
        help="text, or json: one object a line.",
        autocompletion=lambda: list(logs.FORMATS),
        rich_help_panel=COMMON,
    ),
]
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug",
        callback=lambda wanted: _debug(wanted=wanted),
        is_eager=True,
        help="Log all there is, and show tracebacks.",
        rich_help_panel=COMMON,
    ),
]


def _common(
    *,
    config: ConfigOption = None,
    log_level: LogLevelOption = logs.DEFAULT_LEVEL,
    log_format: LogFormatOption = logs.DEFAULT_FORMAT,
    debug: DebugOption = False,
) -> None:
    del config, debug  # their callbacks have acted
    logs.set_up(level="debug" if failures.debugging() else log_level, form=log_format)


_COMMON_PARAMETERS = inspect.signature(_common).parameters


@dataclass(frozen=True, slots=True)
class Declared:
    """A command, before it is one of an application's."""

    name: str
    function: Callable[..., int]
    """Takes the common options, too."""
    examples: Sequence[tuple[str, ...]]
    cls: type[Command]

    def add_to(self, app: typer.Typer, panel: str | None) -> None:
        """Make it one, shown in a panel of the help; or in none, then it is hidden."""
        app.command(
            self.name,
            cls=self.cls,
            rich_help_panel=panel,
            hidden=panel is None,
            epilog=in_markup(self.examples),
        )(self.function)


def command(
    name: str, *, examples: Sequence[tuple[str, ...]] = (), cls: type[Command] = Command
) -> Callable[[Callable[..., int]], Declared]:
    """Declare a function as a command, with the common options behind its own.

    ``examples`` are what the command is good for, and the lines that do that.
    """

    def declare(function: Callable[..., int]) -> Declared:
        @functools.wraps(function)
        def run(**given: Any) -> int:
            _common(**{name: given.pop(name) for name in _COMMON_PARAMETERS})
            return function(**given)

        own = inspect.signature(function)
        parameters = [*own.parameters.values(), *_COMMON_PARAMETERS.values()]
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__doc__ = _unwrapped(inspect.getdoc(function) or "")
        return Declared(name, run, examples, cls)

    return declare


def in_markup(examples: Sequence[tuple[str, ...]]) -> str | None:
    """Examples as the end of a help text, in rich's markup."""
    if not examples:
        return None
    lines = ["[bold]Examples[/bold]"]
    for purpose, *typed in examples:
        end = "" if purpose.endswith("?") else ":"
        lines += ["", f"  {purpose}{end}"]
        lines += [f"    [green]{_escaped(line)}[/green]" for line in typed]
    return "\n".join(lines)


def _unwrapped(text: str) -> str:
    """Paragraphs without line breaks of their own: rich makes those that the terminal needs."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _escaped(line: str) -> str:
    line = line.replace("[", r"\[")
    return line + "\\" if line.endswith("\\") else line  # else it would escape what ends the colour
