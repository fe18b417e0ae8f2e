"""The suite as a person runs it, on a tiny model: every path, and nothing measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench"
DEADLINE = 300


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def test_help_names_the_subcommands() -> None:
    done = bench("--help")
    assert done.returncode == 0
    names = ("engine", "swarm", "relay", "smollm2", "llama-cpp", "frames", "quantization")
    for subcommand in (*names, "weights"):
        assert subcommand in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a subcommand"),
        (["speed"], "invalid choice"),
        (["engine", "--quick", "--part", "nonsense"], "--part: nonsense is none of"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments: list[str], said: str) -> None:
    done = bench(*arguments)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rival_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    done = bench("llama-cpp", "--quick")
    assert done.returncode != 0
    assert "there is no llama-bench on the PATH" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subcommand", "names"),
    [
        ("frames", ["float16 frame of one row", "int8"]),
        (
            "weights",
            ["weights from a peer", "hashed and on the disk", "step while weights are given"],
        ),
        ("quantization", ["weights in nf4: RMS error", "rows sent in int8: held-out perplexity"]),
        (
            "relay",
            ["the first stream to a peer, over a relay", "bulk, directly", "demo through one"],
        ),
        ("swarm", ["3 processes, one session", "8 sessions", "the same 96 tokens once more"]),
        ("smollm2", ["3 processes, KV 16: one session", "a text of 4 tokens"]),
        (
            "engine",
            [
                "decode one session, KV 16",
                "text of one session",
                "4 sessions decode",
                "longest wait of 8 decoding sessions",
                "a second session with the same 96 tokens",
                "a block: load",
            ],
        ),
    ],
)
def test_a_quick_run_writes_rows_and_pictures(
    tmp_path: Path, subcommand: str, names: list[str]
) -> None:
    json_file, pictures = tmp_path / "rows.json", tmp_path / "pictures"
    done = bench(
        subcommand,
        "--quick",
        *("--json", str(json_file), "--markdown", str(tmp_path / "rows.md")),
        *("--pictures", str(pictures), "--models", str(tmp_path / "models")),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(json_file.read_text())
    assert all(set(row) == {"name", "value", "unit", "against", "ratio"} for row in rows)
    for name in names:
        assert any(name in row["name"] for row in rows), name
    exact = [
        row for row in rows if "exact texts" in row["name"] or "token is the first" in row["name"]
    ]
    assert all(row["ratio"] == 1.0 for row in exact)
    assert len(exact) == (3 if subcommand == "engine" else 0)
    drawn = {path.name for path in pictures.glob("*.png")}
    expected = {"latency_by_context.png", "throughput_by_sessions.png", "large_block.png"}
    assert drawn == (expected if subcommand == "engine" else set())
