"""What cannot be is said in one line of words: exit code 2, no traceback, nothing left running."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import trio
from petals.inference.sampling_params import SamplingParams
from petals.protocol.errors import NoRoute
from safetensors.torch import load_file, save_file
from support.processes import (
    LEAVE_DEADLINE,
    LOOPBACK,
    ProcessSwarm,
    originating,
    run_command,
    swarm,
)
from support.reference import ReferenceModel


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a command ends with."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("petals-node: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def run_node(folder: Path, model: str | Path, *options: str) -> str:
    return complaint(
        run_command(
            *("run", "--model", str(model), "--listen", LOOPBACK, "--data-dir", str(folder)),
            *options,
        )
    )


@pytest.fixture
def sharded(random_bloom: ReferenceModel, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    random_bloom.model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][tensor])


LAST = "transformer.h.7.mlp.dense_4h_to_h.weight"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "/no/such/folder" in run_node(tmp_path, "/no/such/folder")


def test_a_missing_shard(sharded: Path, tmp_path: Path) -> None:
    shard = shard_of(sharded, LAST)
    shard.unlink()
    assert shard.name in run_node(tmp_path, sharded, "--blocks", "7:8")


def test_a_corrupt_shard(sharded: Path, tmp_path: Path) -> None:
    shard = shard_of(sharded, LAST)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert shard.name in run_node(tmp_path, sharded, "--blocks", "7:8")


def test_blocks_that_the_model_does_not_have(tmp_path: Path) -> None:
    line = run_node(tmp_path, "demo", "--blocks", "4:9")
    assert "4:9" in line
    assert "8 blocks" in line


@pytest.fixture(scope="module")
def half_a_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessSwarm]:
    """Blocks 0:3 of the demo model, with little room; nobody has the rest."""
    with swarm(tmp_path_factory.mktemp("half")) as processes:
        processes.serve("demo", "0:3", options=["--cache-tokens", "32"])
        yield processes


def test_a_gap_in_coverage(half_a_model: ProcessSwarm) -> None:
    address = half_a_model.address
    line = complaint(
        run_command("generate", "--bootstrap", address, "--patience", "0", "In the beginning")
    )
    assert "3:8" in line
    status = json.loads(run_command("status", "--json", "--bootstrap", address).stdout)
    [model] = status["models"]
    assert model["missing"] == [[3, 8]]
    assert model["coverage"] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_a_prompt_longer_than_the_cache(half_a_model: ProcessSwarm) -> None:
    half_a_model.serve("demo", "3:8", options=["--cache-tokens", "32"])
    address = half_a_model.address
    options = ("--bootstrap", address, "--patience", "0", "--max-new-tokens", "4")
    done = run_command("generate", *options, "word " * 40)
    line = complaint(done)
    assert "KV cache" in line
    assert "32" in line
    short = run_command("generate", *options, "word")
    assert short.returncode == 0, short.stderr


def test_a_model_of_that_name_with_other_weights(
    demo: ReferenceModel, tmp_path: Path, tmp_swarm: ProcessSwarm
) -> None:
    changed = tmp_path / "demo"
    shutil.copytree(demo.folder, changed)
    weights = load_file(changed / "model.safetensors")
    weights["transformer.ln_f.weight"] += torch.ones_like(weights["transformer.ln_f.weight"])
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    tmp_swarm.serve(changed, "0:8")
    line = complaint(run_command("generate", "--bootstrap", tmp_swarm.address, "In the beginning"))
    assert "fingerprint" in line
    assert "1 peer" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_node_leaves_in_time_while_a_session_runs(
    number: signal.Signals, tmp_swarm: ProcessSwarm
) -> None:
    [node] = tmp_swarm.serve("demo", "0:8")
    async with originating(tmp_swarm, "demo", patience=0.0) as originator:
        handle = await originator.submit("In the beginning", SamplingParams(max_new_tokens=2000))
        async for _ in handle:
            break
        node.send_signal(number)
        assert await trio.to_thread.run_sync(node.wait, LEAVE_DEADLINE) == 0, node.errors
        assert await originator.swarm_view() == []  # it said so, nobody waits for its expiry
        with pytest.raises(NoRoute, match="0:8"):
            await handle.result()
        assert handle.partial()[0].text
