"""The command line in one process: exit codes, and words instead of tracebacks."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from petals.node.cli import run
from petals.node.cli.app import PANELS, app, run_command_line
from typer.main import get_command

PEER = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWRqgvzVyfTYV6hvYWYsLnrvYi7NJwFoGkHQY1EpsYUhsN"


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("PETALS_BOOTSTRAP", raising=False)
    monkeypatch.delenv("PETALS_API_KEY", raising=False)
    monkeypatch.setenv("PETALS_DEBUG", "0")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["rum"], "No such command 'rum'. Did you mean 'run'?"),
        (["run", "--modell", "demo"], "--modell"),
        (["run", "--model"], "--model"),
        (["run", "--model", "demo", "--blocks", "5"], "--blocks: '5' is not a range"),
        (["run", "--model", "demo", "--blocks", "5:5"], "--blocks: a span needs"),
        (["run", "--model", "demo", "--num-blocks", "0"], "--num-blocks: 0 is too few"),
        (["run", "--model", "demo", "--num-blocks", "two"], "--num-blocks"),
        (["run", "--model", "demo", "--num-blocks", "2", "--blocks", "0:2"], "not both"),
        (["run", "--blocks", "0:2"], "--model"),
        (["run", "--cache-tokens", "-1"], "--cache-tokens: -1 is too few"),
        (["run", "--peer-sessions", "0"], "--peer-sessions: must be at least 1, got 0"),
        (["run", "--peer-cache-share", "2"], "--peer-cache-share: must be above 0 and at most 1"),
        (["run", "--dtype", "float8"], "float8"),
        (["run", "--public-name", "a\nb"], "public_name"),
        (["run", "--api", "127.0.0.1:0"], "--api: an API to which model"),
        (["run", "--model", "demo", "--api", "8080"], "--api: '8080' is no address"),
        (["run", "--model", "demo", "--api", "0.0.0.0:80"], "so a key is needed"),
        (["run", "--model", "demo", "--api", "a:1", "--api-body", "0"], "--api-body: 0 is too few"),
        (["run", "--listen", "0.0.0.0:31330"], "--listen: '0.0.0.0:31330' is not a multiaddr"),
        (["run", "--bootstrap", "somewhere"], "--bootstrap: 'somewhere' is not a multiaddr"),
        (["run", "--data-dir", "/dev/null"], "data directory /dev/null"),
        (["generate"], "PROMPT"),
        (["generate", "x"], "no way into a swarm"),
        (["generate", "x", "--bootstrap", "/ip4/1.2.3.4/tcp/1"], "names no peer"),
        (["generate", "", "--bootstrap", PEER], "PROMPT"),
        (["generate", "x", "--bootstrap", PEER, "--temperature", "-1"], "temperature"),
        (["generate", "x", "--bootstrap", PEER, "--temperature", "nan"], "temperature"),
        (["generate", "x", "--bootstrap", PEER, "--top-p", "1.5"], "top_p"),
        (["generate", "x", "--bootstrap", PEER, "--top-k", "-1"], "top_k"),
        (["generate", "x", "--bootstrap", PEER, "--max-new-tokens", "0"], "max_new_tokens"),
        (["generate", "x", "--bootstrap", PEER, "--repetition-penalty", "0"], "repetition_"),
        (["generate", "x", "--bootstrap", PEER, "--seed", "-1"], "seed"),
        (["generate", "x", "--bootstrap", PEER, "--stop", ""], "stop"),
        (
            ["generate", "x", "--bootstrap", PEER, "--wire-dtype", "int4"],
            "wire_dtype: 'int4' is none of auto, float32, bfloat16, float16, int8",
        ),
        (["chat", "--bootstrap", PEER, "--wire-dtype", "8"], "wire_dtype: '8' is none of"),
        (["generate", "x", "--bootstrap", PEER, "--patience", "-1"], "patience: must be a number"),
        (["chat", "--bootstrap", PEER, "--patience", "inf"], "patience: must be a number"),
        (["generate", "--bootstrap", PEER, "--resume", "/no/file"], "no file /no/file to go on"),
        (["chat", "--bootstrap", PEER, "--resume", "/dev/null"], "/dev/null is not a file"),
        (["chat"], "no way into a swarm"),
        (["chat", "--bootstrap", PEER, "--max-tokens", "0"], "--max-tokens: 0 is too few"),
        (["status"], "no way into a swarm"),
        (["demo", "--nodes", "0"], "--nodes: 0 is too few"),
        (["demo", "--prompt", ""], "--prompt"),
        (["demo", "--max-new-tokens", "0"], "--max-new-tokens: 0"),
        (["demo", "--nodes", "1000"], "--nodes: the model has"),
        (["demo", "--model", "/no/such/folder"], "/no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_answered_in_words(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert run_command_line(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("petals-node: ")
    assert complaint in shown.err
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err + shown.out


def test_debug_shows_the_traceback_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["--debug", "run", "--blocks", "x"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("petals-node: --blocks")


COMMANDS = [
    command.name for panel, commands in PANELS.items() for command in commands if panel is not None
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_a_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run_command_line([command, "--help"]) == 0
    shown = capsys.readouterr()
    assert f"Usage: petals-node {command}" in shown.out
    _, _, examples = shown.out.partition("Examples")
    assert f"petals-node {command}" in examples
    assert not re.search(r"\[/?[a-z]+\]|\?:", examples), "markup that is shown"
    explained = shown.out.partition("╭")[0].partition(".")[2]
    assert len(explained.split()) > 25, "what it does, and what it needs for that"
    assert "--log-level" in shown.out
    assert "exit-with-stdin" not in shown.out
    assert "\x1b" not in shown.out, "colours, where no terminal is"
    assert not shown.err


def test_help_tells_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"│ {command} " in shown for command in COMMANDS)
    assert "PETALS_NUM_BLOCKS" in shown
    assert "reference" not in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They name no option that is not there, as examples do that outlive what they show."""
    monkeypatch.setenv("PETALS_BOOTSTRAP", PEER)
    group = get_command(app)
    (declared,) = [one for some in PANELS.values() for one in some if one.name == command]
    for _, *lines in declared.examples:
        typed = " ".join(lines).replace("\\ ", "").partition(" | jq")[0]
        typed = typed.replace("$PEER", PEER)
        for line in typed.split("petals-node ")[1:]:
            group.make_context("petals-node", shlex.split(line.partition(" petals-node")[0]))


def test_asking_for_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", "-m", "petals.node", "run", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "trio", "libp2p", "huggingface_hub", "numpy"}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("petals-node dr", ["drain"]),
        ("petals-node run --num", ["--num-blocks"]),
        ("petals-node run --dtype ", ["auto", "float32", "bfloat16", "float16"]),
        ("petals-node api --log-format j", ["json"]),
    ],
)
def test_a_shell_completes_what_is_typed(
    typed: str,
    offered: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("_PETALS_NODE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    assert run_command_line([]) == 0
    assert capsys.readouterr().out.split() == offered


def test_no_command_is_a_call_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line([]) == 0
    assert "generate" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from petals import __version__

    assert run_command_line(["--version"]) == 0
    assert capsys.readouterr().out == f"petals-node {__version__}\n"


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "petals.node", "run", "--blocks", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("petals-node: --blocks: 'x' is not a range of blocks")


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            {"event": "serving", "model": "demo", "blocks": [0, 3], "multiaddr": "/ip4/x"},
            "Serving demo, blocks 0:3, at /ip4/x",
        ),
        (
            {"event": "serving", "model": None, "blocks": None, "multiaddr": "/ip4/x"},
            "Bootstrap peer at /ip4/x",
        ),
        (
            {"event": "serving", "model": "demo", "blocks": [0, 3], "multiaddr": None},
            "Serving demo, blocks 0:3, at no address that others can dial yet",
        ),
        ({"event": "reachability", "reach": "public", "words": "All is well."}, "All is well."),
        ({"event": "starting", "model": "demo"}, "Loading demo …"),
        ({"event": "starting", "model": None}, "Starting …"),
        ({"event": "leaving"}, "Leaving the swarm …"),
    ],
)
def test_events_in_words(event: dict[str, object], words: str) -> None:
    assert json.loads(json.dumps(event)) == event
    assert run.in_words(event) == words
