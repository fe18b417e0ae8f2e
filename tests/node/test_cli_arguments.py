"""What the command line's arguments mean, and that each wrong one is answered in words."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.node.cli import arguments
from petals.protocol.errors import ConfigError
from petals.protocol.span import Span, gaps

PEER = "12D3KooWRqgvzVyfTYV6hvYWYsLnrvYi7NJwFoGkHQY1EpsYUhsN"


@pytest.mark.parametrize(
    "text",
    [
        f"/ip4/127.0.0.1/tcp/31330/p2p/{PEER}",
        f"/ip6/::1/tcp/1/p2p/{PEER}",
        f"/dns4/boot.example.org/tcp/31330/p2p/{PEER}",
        f"/dns/localhost/tcp/65535/ipfs/{PEER}",
    ],
)
def test_addresses_of_peers(text: str) -> None:
    assert arguments.check_peer_multiaddr(text) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a multiaddr"),
        ("nonsense", "not a multiaddr"),
        ("127.0.0.1:31330", "not a multiaddr"),
        ("/ip4/127.0.0.1", "not a multiaddr"),
        (f"/ip4//tcp/31330/p2p/{PEER}", "not a multiaddr"),
        ("/ip4/127.0.0.1/tcp/31330", "names no peer"),
        (f"/ip4/127.0.0.1/tcp/31330/p2p/{PEER}/p2p-circuit", "names no peer"),
        ("/ip4/127.0.0.1/tcp/31330/p2p/bob", "'bob' is not a peer id"),
        (f"/ip4/300.0.0.1/tcp/31330/p2p/{PEER}", "'300.0.0.1' is not an ip4 address"),
        (f"/ip4/::1/tcp/31330/p2p/{PEER}", "'::1' is not an ip4 address"),
        (f"/dns/a b/tcp/31330/p2p/{PEER}", "'a b' is not a host name"),
        (f"/onion/abc/tcp/31330/p2p/{PEER}", "begins with no ip4"),
        (f"/ip4/127.0.0.1/udp/31330/p2p/{PEER}", "not 'udp'"),
        (f"/ip4/127.0.0.1/tcp/65536/p2p/{PEER}", "'65536' is not a port"),
        (f"/ip4/127.0.0.1/tcp/http/p2p/{PEER}", "'http' is not a port"),
        (f"/ip4/127.0.0.1/tcp/0/p2p/{PEER}", "port 0"),
    ],
)
def test_malformed_addresses_of_peers(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arguments.check_peer_multiaddr(text)
    assert complaint in str(caught.value)
    assert "--bootstrap" in str(caught.value)
    assert "/ip4/ADDRESS/tcp/PORT/p2p/PEER_ID" in str(caught.value)


@given(st.text(max_size=80) | st.text("/ip4.tcp:0123 ", max_size=40))
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    for check in (arguments.check_peer_multiaddr, arguments.check_listen_multiaddr):
        with suppress(ConfigError):
            assert check(text) == text


def test_announced_addresses() -> None:
    given_addresses = ["/ip4/203.0.113.5/tcp/31330", "/dns4/node.example/tcp/1"]
    assert arguments.announced_addresses(given_addresses) == tuple(given_addresses)
    assert arguments.announced_addresses(None) == ()
    with pytest.raises(ConfigError, match="--announce"):
        arguments.announced_addresses(["203.0.113.5:31330"])


def test_listen_addresses() -> None:
    given_addresses = ["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/31330"]
    assert arguments.listen_addresses(given_addresses) == tuple(given_addresses)
    assert arguments.listen_addresses(None) == ()


@pytest.mark.parametrize("text", ["0.0.0.0:31330", f"/ip4/0.0.0.0/tcp/0/p2p/{PEER}"])
def test_malformed_listen_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="--listen"):
        arguments.listen_addresses([text])


def test_bootstrap_peers() -> None:
    one, two = f"/ip4/10.0.0.1/tcp/1/p2p/{PEER}", f"/ip4/10.0.0.2/tcp/2/p2p/{PEER}"
    assert arguments.bootstrap_peers(None) == ()
    assert arguments.some_bootstrap_peers([one, two]) == (one, two)
    with pytest.raises(ConfigError, match=r"--bootstrap .* PETALS_BOOTSTRAP"):
        arguments.some_bootstrap_peers(None)


def test_blocks() -> None:
    assert arguments.parse_blocks(None) is None
    assert arguments.parse_blocks("2:5") == Span(2, 5)


@pytest.mark.parametrize("text", ["", "3", "5:2", "2:2", "-1:2", "a:b", "0:8:1"])
def test_malformed_blocks(text: str) -> None:
    with pytest.raises(ConfigError, match="--blocks"):
        arguments.parse_blocks(text)


def test_counts() -> None:
    assert arguments.check_positive(None, "--num-blocks") is None
    assert arguments.check_positive(1, "--num-blocks") == 1
    with pytest.raises(ConfigError, match="--num-blocks: 0 is too few"):
        arguments.check_positive(0, "--num-blocks")


def test_data_dir_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert arguments.check_data_dir(folder) == folder
    assert folder.is_dir()
    assert arguments.check_data_dir(folder) == folder


def test_data_dir_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--data-dir"):
        arguments.check_data_dir(tmp_path / "file")
    with pytest.raises(ConfigError, match="--data-dir"):
        arguments.check_data_dir(tmp_path / "file" / "below")


def test_data_dir_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="no permission"):
        arguments.check_data_dir(tmp_path)


@given(st.integers(1, 200), st.data())
def test_blocks_split_evenly(num_blocks: int, data: st.DataObject) -> None:
    num_nodes = data.draw(st.integers(1, num_blocks))
    spans = arguments.split_evenly(num_blocks, num_nodes)
    assert len(spans) == num_nodes
    assert not gaps(spans, num_blocks)
    assert sum(map(len, spans)) == num_blocks
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


def test_more_nodes_than_blocks() -> None:
    with pytest.raises(ConfigError, match="between 1 and 8 nodes"):
        arguments.split_evenly(8, 9)
