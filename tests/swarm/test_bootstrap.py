"""The peer by which all others came to know each other is killed, and comes back knowing nothing."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from petals.inference.sampling_params import SamplingParams
from support.processes import CommandProcess, ProcessSwarm, originating, run_command, swarm
from support.reference import ReferenceModel

LONG = SamplingParams(max_new_tokens=200)
SHORT = SamplingParams(max_new_tokens=8)
PROMPT = "And it came to pass"
HASTE = 5.0
"""Clocks go so much faster than those of a person's nodes."""
AGAIN = 60.0
"""Seconds in which a swarm finds a bootstrap peer again that was restarted."""


def text_by(address: str, model: ReferenceModel) -> list[int]:
    """What a new originator generates that knows the peer at ``address`` only."""
    options = ("--model", str(model.name), "--max-new-tokens", str(SHORT.max_new_tokens))
    command = ("generate", "--json", "--dtype", "float32", *options)
    with CommandProcess(*command, "--bootstrap", address, "--", PROMPT) as process:
        assert process.wait() == 0, process.errors
        ids: list[int] = json.loads(process.lines[-1])["token_ids"]
        return ids


def served_by(address: str) -> set[str]:
    """Who serves, as the peer at ``address`` has others find out."""
    done = run_command("status", "--json", "--bootstrap", address)
    assert done.returncode == 0, done.stderr
    return {
        peer["peer_id"] for model in json.loads(done.stdout)["models"] for peer in model["peers"]
    }


@pytest.fixture
def quick_swarm(tmp_path: Path) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path, haste=HASTE) as processes:
        yield processes


async def test_the_bootstrap_peer_is_killed_and_comes_back(
    random_bloom: ReferenceModel, quick_swarm: ProcessSwarm
) -> None:
    await trio.to_thread.run_sync(quick_swarm.serve, random_bloom.name, "0:4", "4:8")
    servers = {node.peer_id for node in quick_swarm.nodes}
    [expected] = random_bloom.generate((PROMPT,), LONG)
    async with originating(quick_swarm, random_bloom.name) as node:
        handle = await node.submit(PROMPT, LONG)
        while handle.status().tokens < 10:  # noqa: ASYNC110 - which wakes nobody
            await trio.sleep(0.01)
        quick_swarm.bootstrap.send_signal(signal.SIGKILL)
        quick_swarm.bootstrap.wait()
        assert list((await handle.result()).token_ids) == expected, "a running session goes on"
    other = quick_swarm.nodes[1].multiaddr
    text = await trio.to_thread.run_sync(text_by, other, random_bloom)
    assert text == expected[: SHORT.max_new_tokens], "who knows another peer joins"
    await trio.to_thread.run_sync(quick_swarm.restart_bootstrap)
    with trio.fail_after(AGAIN):
        while await trio.to_thread.run_sync(served_by, quick_swarm.address) != servers:
            pass  # which takes a second
    text = await trio.to_thread.run_sync(text_by, quick_swarm.address, random_bloom)
    assert text == expected[: SHORT.max_new_tokens]
