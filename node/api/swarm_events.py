"""The swarm as it changes, for whoever listens."""

import trio
from starlette.types import Receive, Scope, Send

from ..wakeup import open_flat_nursery
from . import sse
from .errors import ApiError
from .watch import Watch

MAX_LISTENERS = 64
"""Connections that only watch; each costs a few kilobytes a second where much changes."""
HEARTBEAT = 5.0
"""Seconds after which a listener is told that nothing has changed: else who is gone is not noticed."""
BUSY_RETRY_AFTER = 10


class SwarmEvents:
    """``/swarm/events``: an ASGI application that tells the latest until the client has gone."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError when too many listen."""
        del scope
        if self._watch.listeners >= MAX_LISTENERS:
            raise ApiError(
                503,
                f"{MAX_LISTENERS} listen already; ask again later",
                kind="server_error",
                code="overloaded",
                retry_after=BUSY_RETRY_AFTER,
            )
        async with open_flat_nursery() as nursery:
            nursery.start_soon(sse.cancel_at_hangup, receive, nursery.cancel_scope)
            with self._watch.listening() as listener:
                await sse.start(send)
                while True:
                    events = [sse.event({}, "nothing")]
                    with trio.move_on_after(HEARTBEAT):
                        events = [sse.event(told, kind) for kind, told in await listener.next()]
                    await sse.send_events(send, events)
