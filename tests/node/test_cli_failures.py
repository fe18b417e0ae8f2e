"""Which exit code and which line an error gives."""

import pytest
from petals.node.cli import failures
from petals.protocol.errors import (
    CacheFull,
    ConfigError,
    ModelError,
    ModelMismatch,
    NoRoute,
    PeerError,
    PetalsError,
    RemoteProtocolError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (ModelError("x"), 2),
        (ModelMismatch("x"), 2),
        (NoRoute("x"), 2),
        (PeerError("x"), 2),
        (CacheFull("x", retry_after=None), 2),
        (failures.CommandFailed("x"), 1),
        (RemoteProtocolError("x"), 1),
        (PetalsError("x"), 1),
    ],
)
def test_exit_codes(error: PetalsError, code: int) -> None:
    assert failures.explain(error) == (code, "x")


def test_bugs_are_named_and_say_how_to_report_them() -> None:
    code, line = failures.explain(ZeroDivisionError("division\nby zero"))
    assert code == 1
    assert line.startswith("ZeroDivisionError: division by zero (")
    assert "PETALS_DEBUG=1" in line
    assert "\n" not in line


def test_of_a_group_the_telling_error_is_told() -> None:
    inner = ExceptionGroup("", [OSError("broken"), NoRoute("nobody serves blocks 2:4")])
    assert failures.explain(ExceptionGroup("", [ValueError("x"), inner])) == (
        2,
        "nobody serves blocks 2:4",
    )
    interrupted = BaseExceptionGroup("", [NoRoute("x"), KeyboardInterrupt()])
    assert failures.explain(interrupted) == (130, "interrupted")


def test_traceback_of_has_the_cause() -> None:
    try:
        raise ConfigError("outer") from ValueError("inner")
    except ConfigError as error:
        text = failures.traceback_of(error)
    assert "inner" in text
    assert "outer" in text


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True)])
def test_debugging(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("PETALS_DEBUG", value)
    assert failures.debugging() is expected
