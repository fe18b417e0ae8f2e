"""Where the API may listen, and what it is told of that."""

import socket
from typing import Any

import pytest
from petals.node.api.config import ApiConfig, parse_address
from petals.node.api.listening import listen, url
from petals.protocol.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PETALS_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:1", ("localhost", 1)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "8080", ":8080", "host", "host:port", "host:99999", "http://a:1", "a:1/b", "u@a:1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--api: .* is no address to listen on; write HOST:PORT"):
        parse_address(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_beyond_loopback_a_key_is_needed(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--api-key.*PETALS_API_KEY.*127\.0\.0\.1"):
        ApiConfig(host=host)
    assert ApiConfig(host=host, key="secret").host == host
    monkeypatch.setenv("PETALS_API_KEY", "secret")
    assert ApiConfig(host=host).key == "secret"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_on_loopback_none_is(host: str) -> None:
    assert ApiConfig(host=host).key is None


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"key": ""}, "--api-key: must be"),
        ({"key": "schlüssel"}, "--api-key: must be"),
        ({"max_requests": 0}, "--api-requests: must be at least 1"),
        ({"max_body_mib": 0}, "--api-body: must be at least 1"),
        ({"cors_origins": ("example.org",)}, "--cors-origin: 'example.org' is no origin"),
        ({"cors_origins": ("https://a/b",)}, "--cors-origin"),
    ],
)
def test_what_else_cannot_be(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ApiConfig(**fields)


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(ApiConfig(key="secret"))


def test_a_port_in_use_is_told() -> None:
    with listen(ApiConfig(port=0)) as first:
        port = first.getsockname()[1]
        assert url(first) == f"http://127.0.0.1:{port}/v1"
        with pytest.raises(ConfigError, match=rf"port {port} \(Address already in use\); choose"):
            listen(ApiConfig(port=port))


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on nowhere\.invalid"):
        listen(ApiConfig(host="nowhere.invalid", key="secret"))


def test_an_ipv6_address_in_a_url() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with listen(ApiConfig(host="::1", port=0)) as listening:
        assert url(listening).startswith("http://[::1]:")
