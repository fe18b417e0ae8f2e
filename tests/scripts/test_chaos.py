"""The chaos suite as a person runs it, for a moment, on a small swarm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "chaos"
DEADLINE = 300


def chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def test_bad_arguments_are_refused_in_words() -> None:
    done = chaos("--minutes", "0")
    assert done.returncode == 2
    assert "must be positive" in done.stderr


@pytest.mark.slow
def test_a_tormented_swarm_loses_nothing(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ("--minutes", "0.12", "--seed", "4", "--spans", "0:8", "--sessions", "2")
    done = chaos(*options, "--json", str(figures), "--logs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads(figures.read_text())
    assert result["faults"] >= 1
    assert result["sessions"] >= 2
    assert (result["wrong_tokens"], result["lost_sessions"], result["leaks"]) == (0, 0, 0)
    for node in ("0-8a", "0-8b", "bootstrap"):
        assert (tmp_path / node / "log-1.txt").exists()
