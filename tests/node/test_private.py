"""Private swarms: the files that say who may take part, and what happens to the others."""

import os
import stat
from pathlib import Path

import pytest
import trio
from petals.node.cli.app import run_command_line
from petals.node.identity import new_identity
from petals.node.libp2p_network import Libp2pNetwork, NetworkLimits
from petals.node.libp2p_swarm import HostLimits
from petals.node.private import Privacy, load_allowed_peers, load_swarm_key, make_swarm_key
from petals.protocol.errors import ConfigError, PeerError
from support.networks import ECHO, Libp2pWorld, echo, receive_exactly

KEY = bytes(range(32))
ANOTHER = bytes(range(1, 33))
HEX = KEY.hex()
HEADER = "/key/swarm/psk/1.0.0/"
QUICK = 3.0
"""Seconds; the library takes 41 to give up on somebody with another key."""


@pytest.fixture
def world() -> Libp2pWorld:
    return Libp2pWorld(limits=NetworkLimits(host=HostLimits(dial_seconds=2, accept_seconds=2)))


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}\n/base16/\n{HEX}",
        f"{HEADER}\n/base16/\n{HEX}\n",
        f"{HEADER}\r\n/base16/\r\n{HEX.upper()}\r\n",
    ],
)
def test_the_file_of_libp2p_is_read(tmp_path: Path, text: str) -> None:
    file = tmp_path / "swarm.key"
    file.write_text(text)
    assert load_swarm_key(file) == KEY


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no swarm key"),
        (HEX, "`petals-node swarm-key FILE` makes one"),
        (f"{HEADER}\n/base16/\n{HEX[:-2]}", "32 bytes, not 31"),
        (f"{HEADER}\n/base16/\n{HEX[:-1]}g", "not what /base16/ promises"),
        (f"{HEADER}\n/base64/\n{HEX}!", "not what /base64/ promises"),
        (f"{HEADER}\n/bin/\n{HEX}", "'/bin/' is neither"),
    ],
)
def test_what_is_wrong_with_a_key_is_said_without_the_key(
    tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "swarm.key"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_swarm_key(file)
    assert str(file) in str(caught.value)
    assert HEX[:16] not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.key: No such file"):
        load_swarm_key(tmp_path / "nothing.key")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary is not text"):
        load_allowed_peers(binary)


def test_a_key_is_made_for_its_owner_only_and_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "swarm.key"
    assert run_command_line(["swarm-key", str(file)]) == 0
    key = load_swarm_key(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key.hex() not in capsys.readouterr().out
    assert run_command_line(["swarm-key", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert load_swarm_key(file) == key
    with pytest.raises(ConfigError, match="cannot write"):
        make_swarm_key(tmp_path / "no folder" / "swarm.key")
    assert HEX not in repr(Privacy(KEY))


def test_a_list_of_peers_has_comments_and_no_nonsense(tmp_path: Path) -> None:
    one, two = new_identity().peer_id, new_identity().peer_id
    file = tmp_path / "peers"
    file.write_text(f"# ours\n{one}  # the one in the attic\n\n  {two}\n")
    assert load_allowed_peers(file) == {one, two}
    file.write_text(f"{one}\n/ip4/192.0.2.1/tcp/1/p2p/{two}\n")
    with pytest.raises(ConfigError, match=r"line 2: .* is not a peer id"):
        load_allowed_peers(file)


async def talk(client: Libp2pNetwork, server: Libp2pNetwork) -> None:
    server.handle(ECHO, echo)
    stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
    message = os.urandom(1024 * 1024)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send, [message])
        assert await receive_exactly(stream, len(message)) == message
    await stream.close()


async def test_who_has_the_key_takes_part(world: Libp2pWorld) -> None:
    privacy = Privacy(KEY)
    async with (
        world.network(privacy=privacy) as relay,
        world.network(privacy=privacy, bootstrap=relay.multiaddrs, reachability="auto") as server,
        world.network(
            privacy=privacy, bootstrap=relay.multiaddrs, reachability="private"
        ) as hidden,
        world.network(privacy=privacy, serve=False, bootstrap=relay.multiaddrs) as client,
    ):
        assert server.reachability.reach == "public"
        await talk(client, server)
        await talk(client, hidden)


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (KEY, ANOTHER, "wrong swarm key"),
        (None, KEY, "it has no swarm key"),
        (KEY, None, "--swarm-key"),
    ],
)
async def test_who_has_another_key_is_told_so_soon(
    world: Libp2pWorld, theirs: bytes | None, ours: bytes | None, words: str
) -> None:
    async with world.network(privacy=Privacy(theirs)) as server:
        with trio.fail_after(QUICK), pytest.raises(PeerError, match=words):
            async with world.network(
                privacy=Privacy(ours), serve=False, bootstrap=server.multiaddrs
            ):
                pytest.fail("it joined")
        assert server.connected_peers() == ()
        async with world.network(privacy=Privacy(theirs), serve=False) as client:
            await talk(client, server)


async def test_who_is_not_on_the_list_is_hung_up_on(world: Libp2pWorld) -> None:
    friend, stranger = new_identity(), new_identity()
    allowed = Privacy(allowed=frozenset({friend.peer_id}))
    async with (
        world.network(privacy=allowed) as server,
        world.network(identity=friend) as client,
        world.network(identity=stranger) as other,
    ):
        await talk(client, server)
        with trio.fail_after(QUICK), pytest.raises(PeerError, match="list that we are not on"):
            await talk(other, server)
        await talk(server, client)
        with pytest.raises(PeerError, match="not on our list of allowed peers"):
            await talk(server, other)
        assert server.connected_peers() == (friend.peer_id,)


async def test_a_relay_brings_nobody_who_is_not_on_the_list(world: Libp2pWorld) -> None:
    friend = new_identity()
    async with (
        world.network() as relay,
        world.network(
            bootstrap=relay.multiaddrs,
            reachability="private",
            privacy=Privacy(allowed=frozenset({friend.peer_id, relay.peer_id})),
        ) as hidden,
        world.network(identity=friend, serve=False) as client,
        world.network(serve=False) as stranger,
    ):
        await talk(client, hidden)
        with trio.fail_after(QUICK), pytest.raises(PeerError):
            await talk(stranger, hidden)
        assert stranger.peer_id not in hidden.connected_peers()
