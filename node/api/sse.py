"""Answers that come in pieces: server-sent events, and clients that hang up meanwhile."""

import json
from collections.abc import Iterable
from typing import Any

import trio
from starlette.types import Receive, Send

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy would hold pieces back
]


def event(value: Any, kind: str | None = None) -> bytes:
    """One event, of a kind or of none."""
    name = b"" if kind is None else b"event: %s\n" % kind.encode()
    return name + b"data: %s\n\n" % json.dumps(value, separators=(",", ":")).encode()


async def start(send: Send) -> None:
    """Begin the answer."""
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})


async def send_events(send: Send, events: Iterable[bytes]) -> None:
    """Send events, if there are some."""
    if body := b"".join(events):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def end(send: Send) -> None:
    """End the answer."""
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def cancel_at_hangup(receive: Receive, scope: trio.CancelScope) -> None:
    """Cancel ``scope`` when the client goes; a task beside the answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
