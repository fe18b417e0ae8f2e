"""The command line in processes of its own: how commands begin and end."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import COMMAND, LOOPBACK, ServingNode, run_command

pytestmark = pytest.mark.slow

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWRqgvzVyfTYV6hvYWYsLnrvYi7NJwFoGkHQY1EpsYUhsN"


@pytest.fixture
def bootstrap_peer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*COMMAND, "run", "--json", "--listen", LOOPBACK, "--data-dir", str(tmp_path / "boot")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def serving_event(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, object] = json.loads(line)
        if event["event"] == "serving":
            return event
    raise AssertionError("it ended without serving")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bootstrap_peer_says_where_it_is_and_a_signal_ends_it_in_good_order(
    bootstrap_peer: subprocess.Popen[str], number: signal.Signals
) -> None:
    event = serving_event(bootstrap_peer)
    assert set(event) == {"event", "peer_id", "multiaddr", "model", "blocks", "fingerprint"}
    assert event["model"] is None
    assert event["blocks"] is None
    pattern = rf"/ip4/127\.0\.0\.1/tcp/\d+/p2p/{event['peer_id']}"
    assert re.fullmatch(pattern, str(event["multiaddr"]))
    bootstrap_peer.send_signal(number)
    assert bootstrap_peer.wait() == 0


def test_a_node_keeps_its_identity_and_an_empty_swarm_has_a_status(tmp_path: Path) -> None:
    peer_ids = []
    for _ in range(2):
        with ServingNode(tmp_path) as node:
            node.wait_serving()
            peer_ids.append(node.peer_id)
            done = run_command("status", "--json", "--bootstrap", node.multiaddr)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"models": []}
    assert peer_ids[0] == peer_ids[1]


def test_a_port_in_use(tmp_path: Path) -> None:
    with ServingNode(tmp_path / "first") as node:
        node.wait_serving()
        taken = node.multiaddr.partition("/p2p/")[0]
        done = run_command("run", "--listen", taken, "--data-dir", str(tmp_path / "second"))
    assert done.returncode == 2
    assert done.stderr.count("\n") <= 2  # it said that it was starting
    assert "Traceback" not in done.stderr
    assert "in use" in done.stderr


@pytest.mark.parametrize("command", [["generate", "x"], ["chat"], ["status"]])
def test_nobody_answers(command: list[str]) -> None:
    done = run_command(*command, "--bootstrap", NOBODY)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "reach" in done.stderr


def test_the_demo_is_exact_and_leaves_nothing_behind() -> None:
    done = subprocess.run(
        [*COMMAND, "demo", "--nodes", "2", "--max-new-tokens", "12", "--prompt", "And God said"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, token for token (12 tokens)" in done.stdout
    assert "And God said" in done.stdout
    assert "route: originator → node 1 (0:4) → node 2 (4:8) → originator" in done.stdout
    pids = [int(pid) for pid in re.findall(r"process (\d+)", done.stdout)]
    assert len(pids) == 4
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
