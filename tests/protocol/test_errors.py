import pytest
from petals.protocol import errors
from petals.protocol.errors import (
    CacheFull,
    ConfigError,
    ErrorCode,
    NoRoute,
    PeerError,
    PetalsError,
)
from petals.protocol.span import Span


@pytest.mark.parametrize("code", list(ErrorCode))
def test_codes_survive_the_wire(code: ErrorCode) -> None:
    assert ErrorCode.parse(str(code)) is code


@pytest.mark.parametrize("text", ["", "BUSY", "invented by a newer version"])
def test_an_unknown_code_is_other(text: str) -> None:
    assert ErrorCode.parse(text) is ErrorCode.OTHER


def test_every_error_can_be_caught_as_a_petals_error() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, BaseException)
    ]
    assert len(kinds) >= 10
    assert all(issubclass(kind, PetalsError) for kind in kinds)


def test_a_bad_setting_is_a_value_error_too() -> None:
    assert issubclass(ConfigError, ValueError)


def test_errors_carry_what_a_caller_needs_to_act() -> None:
    refused = PeerError("no cache left", code=ErrorCode.BUSY, peer_id="12D3")
    assert (str(refused), refused.code, refused.peer_id) == (
        "no cache left",
        ErrorCode.BUSY,
        "12D3",
    )
    assert PeerError("gone").code is ErrorCode.OTHER
    assert PeerError("gone").peer_id is None
    assert CacheFull("full", retry_after=1.5).retry_after == 1.5
    assert NoRoute("gap", missing=[Span(4, 6)]).missing == (Span(4, 6),)
    assert NoRoute("nobody").missing == ()
