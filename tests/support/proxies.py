"""Proxies before nodes that a test starts: see ``chaos_parts.proxy``."""

import contextlib
from collections.abc import AsyncIterator

import trio
from chaos_parts.proxy import Proxy, free_port


@contextlib.asynccontextmanager
async def proxies(*spans: str, delay: float = 0.0) -> AsyncIterator[dict[str, Proxy]]:
    """A running proxy for each node, by the span that it is to serve; for ``serve_behind``.

    ``delay``: seconds that whatever passes takes, in each direction.
    """
    async with trio.open_nursery() as nursery:
        running = {span: Proxy(free_port()) for span in spans}
        for proxy in running.values():
            proxy.delay = delay
            await nursery.start(proxy.run)
        yield running
        nursery.cancel_scope.cancel()
