"""What the doctor finds on a machine where something is wrong, and that it says what to do."""

import json
import os
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from petals.node.cli import machine
from petals.node.cli.app import run_command_line
from petals.node.cli.findings import State
from petals.node.cli.running import running_in
from petals.node.config import NodeConfig

PEER = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWRqgvzVyfTYV6hvYWYsLnrvYi7NJwFoGkHQY1EpsYUhsN"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PETALS_LISTEN", LOOPBACK)
    monkeypatch.setenv("PETALS_DEBUG", "0")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def _doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, str]]:
    """The findings by their subjects, of which the last counts."""
    code = run_command_line(["doctor", "--json", *arguments])
    record = json.loads(capsys.readouterr().out)
    states = [finding["state"] for finding in record["findings"]]
    assert code == (0 if record["ok"] else 1)
    assert record["ok"] == ("bad" not in states)
    return {finding["subject"]: finding for finding in record["findings"]}


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    found = _doctor(capsys, "--model", "demo")
    assert {one["state"] for one in found.values()} <= {"good", "note"}
    for subject in ("versions", "settings", "torch", "kernels", "memory", "data directory", "port"):
        assert found[subject]["says"]
    assert "a node would begin a swarm of its own" in found["swarm"]["says"]
    assert "it would serve 0:8 of demo's 8 blocks, in float32" in found["blocks"]["says"]


def test_for_people(capsys: pytest.CaptureFixture[str], taken_port: int) -> None:
    listen = f"/ip4/127.0.0.1/tcp/{taken_port}"
    assert run_command_line(["doctor", "--listen", listen]) == 1
    shown = capsys.readouterr().out
    assert f"✗ port: {listen} is in use" in shown
    assert "→ end that, or choose another port with --listen" in shown
    assert shown.endswith("To mend: port.\n")
    assert "\x1b" not in shown


def test_a_port_in_use(taken_port: int) -> None:
    config = NodeConfig(listen=(f"/ip4/127.0.0.1/tcp/{taken_port}",))
    (found,) = machine.ports(config)
    assert found.state is State.BAD
    assert f"(process {os.getpid()})" in found.says
    assert found.advice is not None and "--listen" in found.advice


def test_the_port_of_the_node_that_runs_already(tmp_path: Path, taken_port: int) -> None:
    config = NodeConfig(listen=(f"/ip4/127.0.0.1/tcp/{taken_port}",), data_dir=tmp_path)
    with running_in(tmp_path):
        (port,) = machine.ports(config)
        running, _ = machine.data_directory(config)
    assert port.state is State.GOOD
    assert running.state is State.NOTE
    assert f"runs already, as process {os.getpid()}" in running.says


def test_an_address_of_another_machine() -> None:
    (found,) = machine.ports(NodeConfig(listen=("/ip4/192.0.2.1/tcp/31330",)))
    assert found.state is State.BAD
    assert found.advice is not None and "0.0.0.0" in found.advice


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    *_, found = machine.data_directory(NodeConfig(data_dir=tmp_path))
    assert found.state is State.BAD
    assert "no space: 1 MB free" in found.says
    assert found.advice == "free some, or choose another place with --data-dir"


def test_a_data_directory_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    found = _doctor(capsys, "--data-dir", "/dev/null/x")
    assert found["settings"]["state"] == "bad"
    assert "choose another with --data-dir" in found["settings"]["says"]


def test_no_peer_at_the_bootstrap_address(capsys: pytest.CaptureFixture[str]) -> None:
    found = _doctor(capsys, "--bootstrap", PEER)
    assert found["swarm"]["state"] == "bad"
    assert "no bootstrap peer could be reached" in found["swarm"]["says"]
    assert "--swarm-key" in found["swarm"]["advice"]


def test_a_torch_without_the_device_that_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    found = _doctor(capsys, "--device", "cuda")
    assert found["torch"]["state"] == "bad"
    assert "sees no CUDA device" in found["torch"]["says"]
    assert found["torch"]["advice"]


def test_a_torch_that_leaves_the_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = tmp_path / "nvidia-smi"
    planted.write_text("#!/bin/sh\n")
    planted.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = machine.torch_build("auto")
    assert found.state is State.NOTE
    assert found.advice is not None and "pytorch.org" in found.advice


def test_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    """As one that was built for other libraries, or that an interrupted installation left."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise OSError('libcudart.so.12: cannot open shared object file')"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from petals.node.cli.app import run_command_line\n"
        "sys.exit(run_command_line(['doctor', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    found = {one["subject"]: one for one in json.loads(done.stdout)["findings"]}
    assert "cannot be imported: libcudart.so.12" in found["torch"]["says"]
    assert "pytorch.org" in found["torch"]["advice"]
    assert found["port"]["state"] == "good", "what needs no torch is examined all the same"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    found = machine.kernels()
    assert found.state is State.NOTE
    assert "there is no C compiler (no-such-compiler)" in found.says
    assert found.advice is not None and "apt install gcc" in found.advice


def test_a_package_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda name: ["trio>=99", "no-such-package>=1", "rich>=14"]
    )
    found = machine.versions()
    assert found.state is State.BAD
    assert "trio is " in found.says
    assert "where >=99 is asked; no-such-package is missing" in found.says


def test_a_bad_file_of_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[run]\nnum_blocks = 3\n")
    found = _doctor(capsys, "--config", str(file))
    assert found["settings"]["state"] == "bad"
    assert "has no setting num_blocks; did you mean num-blocks?" in found["settings"]["says"]
    assert str(file) in found["settings"]["advice"]
    assert "torch" in found, "the rest is examined all the same"


def test_the_settings_of_run_are_examined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PETALS_LISTEN")
    file = tmp_path / "config.toml"
    file.write_text(f'[run]\njson = true\nlisten = "{LOOPBACK}"\ndtype = "float8"\n')
    assert run_command_line(["doctor", "--config", str(file)]) == 1
    shown = capsys.readouterr().out
    assert "✗ settings: dtype: 'float8' is none of" in shown, "and [run]'s json is run's alone"
