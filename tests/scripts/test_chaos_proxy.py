"""The proxy of ``scripts/chaos``, before a server that says back what it is told."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
from chaos_parts.proxy import CHUNK, HOST, UNDER_WAY, Proxy

DEADLINE = 20.0


@asynccontextmanager
async def proxied(*, reads: bool = True) -> AsyncIterator[Proxy]:
    """A proxy before an echo server, or before one that never reads."""

    async def echo(stream: trio.SocketStream) -> None:
        if not reads:
            await trio.sleep_forever()
        with suppress(trio.BrokenResourceError):
            async for data in stream:
                await stream.send_all(data)

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, echo, 0, host=HOST))
            proxy = Proxy(listeners[0].socket.getsockname()[1])
            await nursery.start(proxy.run)
            yield proxy
            nursery.cancel_scope.cancel()


async def read(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.receive_some()
        assert more, data
        data += more
    return data


async def test_what_is_said_passes_in_order_however_late() -> None:
    async with proxied() as proxy, await trio.open_tcp_stream(HOST, proxy.port) as stream:
        proxy.delay = 0.2
        await stream.send_all(b"slow ")
        await trio.testing.wait_all_tasks_blocked()
        proxy.delay = 0.0
        await stream.send_all(b"fast")
        assert await read(stream, 9) == b"slow fast"
        await stream.send_eof()
        assert await stream.receive_some() == b""


async def test_a_cut_breaks_every_connection_and_lets_new_ones_through() -> None:
    async with (
        proxied() as proxy,
        await trio.open_tcp_stream(HOST, proxy.port) as one,
        await trio.open_tcp_stream(HOST, proxy.port) as two,
    ):
        for stream in (one, two):
            await stream.send_all(b"x")
            assert await read(stream, 1) == b"x"
        assert proxy.connections == 2
        assert proxy.cut() == 2
        for stream in (one, two):
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        async with await trio.open_tcp_stream(HOST, proxy.port) as again:
            await again.send_all(b"y")
            assert await read(again, 1) == b"y"


async def test_nobody_gets_through_while_it_refuses() -> None:
    async with proxied() as proxy:
        proxy.refusing = True
        async with await trio.open_tcp_stream(HOST, proxy.port) as stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        assert proxy.connections == 0


async def test_a_node_that_is_not_there_refuses_through_its_proxy() -> None:
    async with proxied() as proxy:
        proxy.target = 9
        async with await trio.open_tcp_stream(HOST, proxy.port) as stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()


async def test_what_is_under_way_is_bounded() -> None:
    """Before a reader that never reads, a writer has to wait."""
    async with (
        proxied(reads=False) as proxy,
        await trio.open_tcp_stream(HOST, proxy.port) as stream,
    ):
        proxy.delay = DEADLINE
        sent = 0
        with trio.move_on_after(1.0):
            while True:
                await stream.send_all(bytes(CHUNK))
                sent += CHUNK
        assert UNDER_WAY * CHUNK < 16 * 2**20
        assert sent < 16 * 2**20 + UNDER_WAY * CHUNK
