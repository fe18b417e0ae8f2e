"""The proxy of ``scripts/chaos``, before a server that says back what it is told."""

import math
import select
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
from chaos_parts.proxy import CHUNK, HOST, UNDER_WAY, Proxy

DEADLINE = 20.0
CUSHION = 0.05
"""Seconds in which no task runs, when all wait: what is on its way through the kernel arrives."""
SOME = 1 << 20
KERNEL = 16 << 20
"""What the kernel may hold of a connection, of which there are two in a row."""


async def echo(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        async for data in stream:
            await stream.send_all(data)


@asynccontextmanager
async def proxied(
    serve: Callable[[trio.SocketStream], Awaitable[None]] = echo,
) -> AsyncIterator[Proxy]:
    """A proxy before a server, with a deadline for all that is done with it."""
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host=HOST))
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


def is_readable(stream: trio.SocketStream) -> bool:
    return bool(select.select([stream.socket], [], [], 0)[0])


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


async def test_a_cut_breaks_the_side_of_the_node_too() -> None:
    broken = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        broken.set()

    async with proxied(serve) as proxy, await trio.open_tcp_stream(HOST, proxy.port) as stream:
        assert await read(stream, 1) == b"x"
        proxy.cut()
        await broken.wait()


async def test_what_was_said_before_an_orderly_end_arrives() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(bytes(SOME))
        await stream.aclose()

    async with proxied(serve) as proxy, await trio.open_tcp_stream(HOST, proxy.port) as stream:
        await stream.send_eof()
        assert len(await read(stream, SOME)) == SOME
        assert await stream.receive_some() == b""


async def test_nothing_passes_while_it_is_silent_and_all_of_it_afterwards() -> None:
    async with proxied() as proxy, await trio.open_tcp_stream(HOST, proxy.port) as stream:
        proxy.silent = True
        await stream.send_all(b"held ")
        async with await trio.open_tcp_stream(HOST, proxy.port) as other:
            await other.send_all(b"held, too")
            for mute in (stream, other):
                await trio.testing.wait_all_tasks_blocked(CUSHION)
                assert not is_readable(mute)
            await stream.send_all(b"back")
            proxy.silent = False
            assert await read(stream, 9) == b"held back"
            assert await read(other, 9) == b"held, too"


@pytest.mark.parametrize(
    ("what", "slow", "fast"), [("delay", DEADLINE, 0.0), ("rate", 1 / DEADLINE, math.inf)]
)
async def test_what_is_late_stays_late_and_so_does_what_is_said_behind_it(
    what: str, slow: float, fast: float
) -> None:
    async with proxied() as proxy, await trio.open_tcp_stream(HOST, proxy.port) as stream:
        setattr(proxy, what, slow)
        await stream.send_all(b"x")
        await trio.testing.wait_all_tasks_blocked(CUSHION)
        setattr(proxy, what, fast)
        await stream.send_all(b"y")
        async with await trio.open_tcp_stream(HOST, proxy.port) as other:
            await other.send_all(b"z")
            assert await read(other, 1) == b"z"
        assert not is_readable(stream)


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


@pytest.mark.parametrize("hold", ["delay", "silent"])
async def test_what_is_under_way_is_bounded(hold: str) -> None:
    """A writer has to wait when nothing gets through."""
    async with proxied() as proxy, await trio.open_tcp_stream(HOST, proxy.port) as stream:
        setattr(proxy, hold, DEADLINE)
        sent = 0

        async def write() -> None:
            nonlocal sent
            while True:
                await stream.send_all(bytes(CHUNK))
                sent += CHUNK

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            before = -1
            while before < sent:
                before = sent
                await trio.testing.wait_all_tasks_blocked(CUSHION)
            nursery.cancel_scope.cancel()
        assert sent <= UNDER_WAY * CHUNK + KERNEL
