"""Options from the command line, the environment and the file, and what is wrong with the file."""

import json
from pathlib import Path
from typing import Any

import pytest
from petals.node.cli import settings
from petals.node.cli.app import PANELS, app, run_command_line
from petals.protocol.errors import ConfigError
from typer.main import get_command

COMMANDS = [one.name for panel, some in PANELS.items() for one in some if panel is not None]
OPTIONS = {"run": ["model", "num-blocks", "mdns"], "status": ["model", "watch"]}


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PETALS_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("PETALS_DEBUG", "0")
    (tmp_path / "config.toml").write_text("")


def _understood(*typed: str) -> dict[str, object]:
    """What the options of a command line come to."""
    command, *rest = typed
    root = get_command(app)
    parent = root.make_context("petals-node", [command, *rest])
    inner = root.get_command(parent, command)  # type: ignore[attr-defined]
    with parent:
        context = inner.make_context(command, rest, parent=parent)
    return dict(context.params)


def test_the_command_line_goes_before_the_environment_before_the_file_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _understood("run")["max_sessions"] == 1024
    (tmp_path / "config.toml").write_text("max-sessions = 5")
    assert _understood("run")["max_sessions"] == 5
    monkeypatch.setenv("PETALS_MAX_SESSIONS", "6")
    assert _understood("run")["max_sessions"] == 6
    assert _understood("run", "--max-sessions", "7")["max_sessions"] == 7


def test_every_kind_of_value_can_be_set_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        'model = "demo"\nmdns = false\nbootstrap = ["/a", "/b"]\nlisten = "/c"\n'
        "[run]\nnum-blocks = 3\njson = true\nthroughput = 2.5\n"
        'swarm-key = "key"\n[generate]\ntemperature = 1\nstop = ["a b", "c"]\n'
    )
    run = _understood("run")
    assert (run["model"], run["mdns"], run["num_blocks"]) == ("demo", False, 3)
    assert (run["bootstrap"], run["listen"]) == (["/a", "/b"], ["/c"])
    assert (run["json_lines"], run["throughput"]) == (True, 2.5)
    assert run["swarm_key"] == Path("key")
    generate = _understood("generate", "x")
    assert (generate["model"], generate["temperature"], generate["stop"]) == (
        "demo",
        1.0,
        ["a b", "c"],
    )
    assert generate["swarm_key"] is None, "that is run's alone"


def test_every_kind_of_value_can_be_set_in_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PETALS_BOOTSTRAP", " /a  /b ")
    monkeypatch.setenv("PETALS_MDNS", "0")
    monkeypatch.setenv("PETALS_JSON", "yes")
    monkeypatch.setenv("PETALS_SWARM_KEY", "")
    run = _understood("run")
    assert (run["bootstrap"], run["mdns"], run["json_lines"]) == (["/a", "/b"], False, True)
    assert run["swarm_key"] is None, "empty is as good as not there"


VALUES: dict[object, object] = {
    int: 7,
    float: 0.625,
    str: "word",
    Path: "x/y",
    list[str]: "word",
}
"""Of each kind of option one that is nobody's default."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_can_be_set_in_each_of_the_three_places(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PETALS_DATA_DIR")
    monkeypatch.delenv("PETALS_DEBUG")
    declared: Any = get_command(app).get_command(None, command)  # type: ignore[attr-defined]
    options = {key: one for key, one in declared.settings.items() if key != "debug"}
    positional = ("file",) if command == "swarm-key" else ()
    needed = ("--model", "demo") if command == "seed" else ()
    default = _understood(command, *positional, *needed)
    typed, lines = [], [f"[{command}]"]
    with monkeypatch.context() as patched:
        for key, option in options.items():
            value = VALUES.get(option.type_descriptor.annotation, not default[option.name])
            name = f"--{key}" if value else option.secondary_opts[0]
            typed += [name] if option.is_flag else [name, str(value)]
            lines.append(f"{key} = {json.dumps(value)}")
            patched.setenv(f"PETALS_{key.replace('-', '_').upper()}", str(value))
        in_environment = _understood(command, *positional)
    on_the_line = _understood(command, *positional, *typed)
    (tmp_path / "config.toml").write_text("\n".join(lines))
    assert on_the_line == in_environment == _understood(command, *positional)
    assert all(on_the_line[one.name] != default[one.name] for one in options.values())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("modell = 'demo'", "has no setting modell; did you mean model?"),
        ("num_blocks = 3", "has no setting num_blocks; did you mean num-blocks?"),
        ("[run]\nwatch = true", r"\[run\] has no setting watch; a key is the name of an option"),
        ("[rum]\nmodel = 'demo'", r"has no setting \[rum\]; did you mean \[run\]\?"),
        ("xyzzy = 3", "has no setting xyzzy; a key is the name of an option, without --"),
        ("model = {a = 1}", "model must be a text, a number"),
        ("[run]\nmodel = {a = 1}", "model must be a text, a number, true or false, or a list"),
        ("model = 2026-01-01", "model must be a text"),
        ("run = 3", "has no setting run"),
        ("model = \n", "is not TOML: Invalid value .at line 1"),
    ],
)
def test_a_bad_file_is_answered_in_words(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        settings.parse(text, "the file", OPTIONS)
    assert str(caught.value).startswith("the file")


def test_a_table_goes_before_the_rest() -> None:
    read = settings.parse("model = 'a'\n[run]\nmodel = 'b'", "the file", OPTIONS)
    assert (read.value(["run"], "model"), read.value(["status"], "model")) == ("b", "a")
    assert read.value(["status", "run"], "model") == "b"
    assert read.value(["run"], "num-blocks") is None


def test_a_file_that_is_named_must_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["status", "--config", "/no/such/file"]) == 2
    assert "--config: there is no file /no/such/file" in capsys.readouterr().err
    assert run_command_line(["status", "--config", "/"]) == 2
    assert "--config: cannot read /: Is a directory" in capsys.readouterr().err


def test_nobody_misses_the_file_of_the_usual_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PETALS_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert _understood("run")["model"] is None
    settings.default_file().parent.mkdir()
    settings.default_file().write_text("model = 'demo'")
    assert _understood("run")["model"] == "demo"


def test_a_complaint_says_where_the_value_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("model = 'demo'\nnum-blocks = 0\ndtype = 'float8'\npeer-opens = 'many'")
    assert run_command_line(["run"]) == 2
    shown = capsys.readouterr().err
    assert "'--peer-opens': Input should be a valid number" in shown
    assert f"(set by {file})" in shown
    monkeypatch.setenv("PETALS_PEER_OPENS", "1")
    assert run_command_line(["run"]) == 2
    assert "--num-blocks: 0 is too few" in (shown := capsys.readouterr().err)
    assert f"(set by {file})" in shown
    monkeypatch.setenv("PETALS_NUM_BLOCKS", "-1")
    assert run_command_line(["run"]) == 2
    assert "(set by PETALS_NUM_BLOCKS)" in capsys.readouterr().err
    assert run_command_line(["run", "--num-blocks", "1"]) == 2
    assert f"dtype: 'float8' is none of auto, float32, bfloat16, float16 (set by {file})" in (
        capsys.readouterr().err
    )
    assert run_command_line(["run", "--num-blocks", "0"]) == 2
    assert "set by" not in capsys.readouterr().err


def test_a_complaint_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["run", "--log-format", "json", "--num-blocks", "0"]) == 2
    record = json.loads(capsys.readouterr().err)
    assert record["level"] == "error"
    assert record["message"].startswith("--num-blocks: 0 is too few")
    assert record["time"].endswith("+00:00")


@pytest.mark.parametrize("option", ["--log-level", "--log-format"])
def test_unknown_logging(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert run_command_line(["status", option, "loud"]) == 2
    assert f"{option}: 'loud' is none of" in capsys.readouterr().err
