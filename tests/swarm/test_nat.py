"""Nodes behind real NAT, in network namespaces: found out, relayed, announced so, used, and met."""

import contextlib
import json
import signal
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
PROMPT = "And God said, Let there be"
TOKENS = 16


@pytest.fixture
def internet() -> Iterator[Internet]:
    if reason := namespaces.missing():
        pytest.skip(reason)
    with namespaces.internet() as made:
        yield made


@contextlib.contextmanager
def serving(folder: Path, *options: str, network: str) -> Iterator[ServingNode]:
    folder.mkdir()
    node = ServingNode(folder, *options, "--debug", listen=LISTEN, network=network)
    with node:
        node.wait_serving()
        yield node


@contextlib.contextmanager
def relay_and_hidden(
    internet: Internet, folder: Path, *options: str, first: str, second: str
) -> Iterator[tuple[ServingNode, ServingNode]]:
    """A public node with the ``first`` blocks, none if empty, and one behind NAT with the others.

    ``options`` are the latter's.
    """
    model = ("--model", "demo")
    blocks = (*model, "--blocks", first) if first else ()
    with (
        serving(folder / "public", *blocks, network=internet.public) as relay,
        serving(
            folder / "home",
            *(*model, "--blocks", second, "--bootstrap", relay.multiaddr, *options),
            network=internet.home,
        ) as hidden,
    ):
        yield relay, hidden


def check_text(
    network: str, relay: ServingNode, hops: set[str], model: ReferenceModel, *options: str
) -> None:
    """Generate in that network; the text and the route are the right ones."""
    joining = ("--model", "demo", "--bootstrap", relay.multiaddr)
    command = ("generate", "--json", "--max-new-tokens", str(TOKENS), *joining, *options)
    with CommandProcess(*command, "--", PROMPT, network=network) as process:
        assert process.wait() == 0, process.errors
        result = json.loads(process.lines[-1])
    assert {hop["peer_id"] for hop in result["route"]} == hops
    assert [result["token_ids"]] == model.generate((PROMPT,), SamplingParams(max_new_tokens=TOKENS))


def test_a_session_runs_through_a_node_behind_nat(
    internet: Internet, demo: ReferenceModel, tmp_path: Path
) -> None:
    with (
        namespaces.forwarding_router(internet) as router,
        relay_and_hidden(internet, tmp_path, "--no-upnp", first="0:4", second="4:8") as (
            relay,
            hidden,
        ),
    ):
        assert relay.multiaddr.startswith(f"/ip4/{internet.public_address}/tcp/31330/")
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

        check_text(internet.far, relay, {relay.peer_id, hidden.peer_id}, demo)
        assert router.asked == []


def test_two_behind_nat_meet_directly(
    internet: Internet, demo: ReferenceModel, tmp_path: Path
) -> None:
    with relay_and_hidden(internet, tmp_path, first="", second="0:8") as (relay, hidden):
        check_text(internet.flat, relay, {hidden.peer_id}, demo)
        assert "a hole was punched to" in hidden.errors


def test_a_router_that_forwards_ports_makes_a_node_behind_it_public(
    internet: Internet, demo: ReferenceModel, tmp_path: Path
) -> None:
    with (
        namespaces.forwarding_router(internet) as router,
        relay_and_hidden(internet, tmp_path, first="", second="0:8") as (relay, home),
    ):
        told = home.event("reachability")
        assert told["reach"] == "public"
        assert told["forwarded_port"] == 31330
        outer = f"/ip4/{internet.router_address}/tcp/31330/p2p/{home.peer_id}"
        assert told["multiaddrs"][0] == outer
        assert "its router forwards TCP port 31330 to it (UPnP)" in told["words"]
        check_text(internet.far, relay, {home.peer_id}, demo)
        assert "a hole was punched to" not in home.errors
        assert list(router.table) == [31330]
        home.send_signal(signal.SIGTERM)
        assert home.wait() == 0
        assert router.table == {}
