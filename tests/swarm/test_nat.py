"""A node behind a real NAT, in network namespaces: found out, relayed, announced so, and used."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from petals.inference.sampling_params import SamplingParams
from support import namespaces
from support.forked import ForkedProcess
from support.namespaces import Internet
from support.processes import DEADLINE, CommandProcess, ServingNode, environment
from support.reference import ReferenceModel

LISTEN = "/ip4/0.0.0.0/tcp/31330"


@pytest.fixture
def internet() -> Iterator[Internet]:
    if reason := namespaces.missing():
        pytest.skip(reason)
    with namespaces.internet() as made:
        yield made


@contextlib.contextmanager
def serving(folder: Path, *options: str, network: str) -> Iterator[ServingNode]:
    folder.mkdir()
    node = ServingNode(folder, *options, listen=LISTEN, network=network)
    with node:
        node.wait_serving()
        yield node


def test_a_session_runs_through_a_node_behind_nat(
    internet: Internet, demo: ReferenceModel, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(
            serving(
                tmp_path / "public",
                *("--model", "demo", "--blocks", "0:4"),
                network=internet.public,
            )
        )
        joining = ("--model", "demo", "--bootstrap", relay.multiaddr)
        assert relay.multiaddr.startswith(f"/ip4/{internet.public_address}/tcp/31330/")
        hidden = stack.enter_context(
            serving(tmp_path / "home", *joining, "--blocks", "4:8", network=internet.home)
        )
        told = hidden.event("reachability")
        assert told["reach"] == "private"
        assert told["relays"] == [relay.peer_id]
        assert told["multiaddrs"] == [f"{relay.multiaddr}/p2p-circuit/p2p/{hidden.peer_id}"]
        assert "forward TCP port 31330 of your router" in told["words"]
        while relay.event("reachability")["reach"] != "public":
            pass  # it was dialled, which it finds out when it looks next

        code, output, errors = ForkedProcess(
            ["status", "--json", "--bootstrap", relay.multiaddr],
            environment(PETALS_TEST_NETWORK=internet.far),
        ).communicate("", DEADLINE)
        assert code == 0, errors
        [model] = json.loads(output)["models"]
        announced = {peer["peer_id"]: peer["multiaddrs"] for peer in model["peers"]}
        assert announced[hidden.peer_id] == told["multiaddrs"]
        assert all("/p2p-circuit" not in address for address in announced[relay.peer_id])

        prompt = "And God said, Let there be"
        generate = stack.enter_context(
            CommandProcess(
                *("generate", "--json", "--max-new-tokens", "16", *joining, "--", prompt),
                network=internet.far,
            )
        )
        assert generate.wait() == 0, generate.errors
        result = json.loads(generate.lines[-1])
        assert {hop["peer_id"] for hop in result["route"]} == {relay.peer_id, hidden.peer_id}
        assert [result["token_ids"]] == demo.generate((prompt,), SamplingParams(max_new_tokens=16))
