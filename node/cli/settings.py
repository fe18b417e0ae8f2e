"""The file of settings: what options default to, of all commands or of one, in TOML.

    bootstrap = ["/ip4/…/tcp/…/p2p/…"]   # of every command that has --bootstrap

    [run]                                # of `petals-node run` alone; goes before the above
    model = "bigscience/bloom-560m"
    num-blocks = 4

Rules of this file: a key is an option's name. One that is none is an error, because a setting that
is misspelt would be a setting that does nothing.
"""

import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from ...protocol.errors import ConfigError

OptionsOfCommands = Mapping[str, Collection[str]]
"""By the commands' names, the keys that each of them understands."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a file says."""

    common: Mapping[str, Any]
    of_command: Mapping[str, Mapping[str, Any]]

    def value(self, tables: Sequence[str], key: str) -> Any:
        """What the option is set to, in the first of the tables that has it; None if it is not."""
        places = (*(self.of_command.get(table, {}) for table in tables), self.common)
        return next((place[key] for place in places if key in place), None)


def default_file() -> Path:
    """Where the file is looked for when nobody names one."""
    return platformdirs.user_config_path("petals-node") / "config.toml"


def read(path: Path, options: OptionsOfCommands, *, must_exist: bool) -> Settings:
    """Read a file. Raises ConfigError, in words, for whatever is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if must_exist:
            raise ConfigError(f"--config: there is no file {path}") from None
        return Settings({}, {})
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: {path} is no text in UTF-8: {error.reason}") from error
    return parse(text, str(path), options)


def parse(text: str, name: str, options: OptionsOfCommands) -> Settings:
    """Understand what the file called ``name`` says. Raises ConfigError, in words."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}") from error
    common, of_command = {}, {}
    everything = {key for keys in options.values() for key in keys}
    for key, value in content.items():
        if key in options and isinstance(value, dict):
            for inner, setting in value.items():
                where = f"{name}: [{key}]"
                if inner not in options[key]:
                    raise _unknown(where, inner, options[key])
                _check(where, inner, setting)
            of_command[key] = value
        elif key in everything:
            _check(name, key, value)
            common[key] = value
        else:
            known = options if isinstance(value, dict) else everything
            raise _unknown(name, f"[{key}]" if isinstance(value, dict) else key, known)
    return Settings(common, of_command)


def _unknown(where: str, key: str, known: Iterable[str]) -> ConfigError:
    wanted = key.strip("[]").replace("_", "-")
    near = difflib.get_close_matches(wanted, sorted(known), n=1, cutoff=0.5)
    shown = f"[{near[0]}]" if near and key.startswith("[") else "".join(near)
    advice = f"did you mean {shown}?" if near else "a key is the name of an option, without --"
    return ConfigError(f"{where} has no setting {key}; {advice}")


def _check(where: str, key: str, value: object) -> None:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) for one in values):
        raise ConfigError(
            f"{where}: {key} must be a text, a number, true or false, or a list of those, not "
            f"{value!r}"
        )
