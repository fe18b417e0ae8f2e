"""What the API does with bodies that do not come, or are no end of."""

from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing
from petals.node.api.errors import ApiError
from petals.node.api.generating import BODY_TIMEOUT, read_body
from starlette.types import Receive


def arriving(*messages: dict[str, Any]) -> Receive:
    """A client that sends these, and then nothing more."""
    left: Iterator[dict[str, Any]] = iter(messages)

    async def receive() -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        for message in left:
            return {"type": "http.request", **message}
        await trio.sleep_forever()
        raise AssertionError("for ever")

    return receive


async def refused(receive: Receive) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await read_body(receive, 10)
    return caught.value


async def test_a_body_in_pieces() -> None:
    pieces = arriving({"body": b"ab", "more_body": True}, {"body": b"cd"})
    assert await read_body(pieces, 10) == b"abcd"


async def test_a_client_that_does_not_send(autojump_clock: trio.testing.MockClock) -> None:
    error = await refused(arriving({"body": b"ab", "more_body": True}))
    assert error.status == 408
    assert trio.current_time() >= BODY_TIMEOUT


async def test_a_client_that_hangs_up() -> None:
    assert (await refused(arriving({"type": "http.disconnect"}))).status == 400


async def test_a_body_that_is_too_large_is_read_to_its_end() -> None:
    error = await refused(arriving({"body": b"x" * 11, "more_body": True}, {"body": b"y"}))
    assert (error.status, error.code) == (413, "too_large")
    assert "12 bytes" in str(error)
