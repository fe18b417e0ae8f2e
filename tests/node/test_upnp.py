"""Routers that forward a port, that do not, and that mean harm; all of them on loopback."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import pytest
import trio
from petals.node.upnp.forwarding import Forwarded, ForwardingLimits, PortForwarding
from petals.node.upnp.router import DESCRIPTION
from support.fake_router import FakeRouter, Forward, description, http

HERE = "127.0.0.1"
PORT = 31330
DEADLINE = 10.0
OURS = Forward(HERE, PORT, DESCRIPTION, 3600)
SOON = 0.05
NEVER = 3600.0


@dataclass
class Asking:
    """What a node sees of it."""

    forwarding: PortForwarding
    changes: list[Forwarded | None]


@contextlib.asynccontextmanager
async def asking(
    *routers: FakeRouter,
    renew: float = NEVER,
    retry: float = NEVER,
    ask: float = DEADLINE,
    search: float = DEADLINE,
    inside: Sequence[tuple[str, int]] = ((HERE, PORT),),
) -> AsyncIterator[Asking]:
    """A node behind a router, that has been asked; the node's end is the block's."""
    async with trio.open_nursery() as nursery:
        for router in routers:
            await nursery.start(router.serve)
        limits = ForwardingLimits(
            search_seconds=search,
            ask_seconds=ask,
            renew_seconds=renew,
            retry_seconds=retry,
            group=routers[0].searched_at,
        )
        changes: list[Forwarded | None] = []
        forwarding = PortForwarding(
            lambda: inside, lambda: changes.append(forwarding.forwarded), limits
        )
        async with trio.open_nursery() as ours:
            ours.start_soon(forwarding.run)
            with trio.fail_after(DEADLINE):
                await forwarding.asked()
            yield Asking(forwarding, changes)
            ours.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(DEADLINE):
        while not condition():  # noqa: ASYNC110 - the router is no friend of ours
            await trio.sleep(0.01)


async def test_a_port_is_forwarded_for_a_while_and_taken_back_at_the_end() -> None:
    router = FakeRouter()
    async with asking(router) as node:
        assert node.forwarding.forwarded == Forwarded(PORT, router.outer_host)
        assert node.changes == [node.forwarding.forwarded]
        assert router.table == {PORT: OURS}
    assert router.table == {}
    assert router.asked == [
        *("GetSpecificPortMappingEntry", "AddPortMapping", "GetExternalIPAddress"),
        "DeletePortMapping",
    ]


async def test_a_lease_is_renewed_and_what_a_router_forgets_is_asked_for_again() -> None:
    router = FakeRouter()
    async with asking(router, renew=SOON) as node:
        await until(lambda: router.asked.count("AddPortMapping") == 3)
        router.table.clear()
        await until(lambda: router.table == {PORT: OURS})
        assert node.changes == [Forwarded(PORT, router.outer_host)]


async def test_a_router_that_stops_forwarding_is_noticed_and_tried_again() -> None:
    router = FakeRouter()
    async with asking(router, renew=SOON, retry=SOON, search=0.2) as node:
        router.refusals["AddPortMapping"] = 606
        await until(lambda: node.forwarding.forwarded is None)
        router.refusals.clear()
        await until(lambda: node.forwarding.forwarded is not None)
        assert len(node.changes) == 3


@pytest.mark.parametrize("others", [1, 3])
async def test_a_port_that_is_forwarded_to_others_stays_so(others: int) -> None:
    theirs = {PORT + each: Forward("127.0.0.9", PORT, DESCRIPTION) for each in range(others)}
    router = FakeRouter(table=dict(theirs))
    async with asking(router) as node:
        assert node.forwarding.forwarded == Forwarded(PORT + others, router.outer_host)
        assert router.table == {**theirs, PORT + others: OURS}
    assert router.table == theirs


async def test_what_a_killed_node_has_left_is_used_again() -> None:
    router = FakeRouter(table={PORT: OURS})
    async with asking(router) as node:
        assert node.forwarding.forwarded == Forwarded(PORT, router.outer_host)
        assert router.table == {PORT: OURS}
    assert router.table == {}


async def test_what_the_user_has_forwarded_is_used_and_left_alone() -> None:
    by_hand = {PORT: Forward(HERE, PORT, "my node")}
    router = FakeRouter(table=dict(by_hand))
    async with asking(router) as node:
        assert node.forwarding.forwarded == Forwarded(PORT, router.outer_host)
    assert router.table == by_hand
    assert "AddPortMapping" not in router.asked


async def test_a_router_without_leases_forwards_until_it_is_told_otherwise() -> None:
    router = FakeRouter(leases=False)
    async with asking(router):
        assert router.table == {PORT: Forward(HERE, PORT, DESCRIPTION, 0)}
    assert router.table == {}


@pytest.mark.parametrize(
    "outer", ["192.168.1.7", "100.64.3.1", "0.0.0.0", "224.0.0.1", "fe80::1", "nonsense", ""]
)
async def test_an_outer_address_that_nobody_can_dial_is_not_told(outer: str) -> None:
    async with asking(FakeRouter(outer_host=outer)) as node:
        assert node.forwarding.forwarded == Forwarded(PORT, None)


async def test_who_has_nothing_to_forward_to_asks_nobody() -> None:
    router = FakeRouter()
    async with asking(router, inside=()) as node:
        assert node.forwarding.forwarded is None
        assert node.changes == []
    assert router.asked == []


async def test_without_a_router_one_knows_so_when_the_search_ends() -> None:
    silent = FakeRouter(location="http://127.0.0.1/")  # not its own port: nobody is there
    async with asking(silent, search=0.1) as node:
        assert node.forwarding.forwarded is None


XML = b"HTTP/1.1 200 OK\r\n\r\n<?xml version='1.0'?>"
LAUGHS = (
    XML + b"<!DOCTYPE root [<!ENTITY a 'ha'>"
    b"<!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;'><!ENTITY c '&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;'>"
    b"]><root>&c;</root>"
)
SECRET = XML + b"<!DOCTYPE root [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><root>&x;</root>"


@pytest.mark.parametrize(
    "answer",
    [
        b"\x00\xff" * 5000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"<x>" * 100_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n<x/>",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Go on\r\n\r\n" * 1000,
        XML + b"<x>" * 15_000 + b"</x>" * 15_000,
        XML + b"<root><service><serviceType/></service></root>",
        b"HTTP/1.1 200 OK\r\n\r\n<?xml version='1.0' encoding='nonsense'?><x/>",
        b"HTTP/1.1 200 OK\r\n\r\n<?xml version='1.0' encoding='utf-7'?><x/>",
        LAUGHS,
        SECRET,
        http(description(control="http://192.0.2.1/control")),
        http(description(control="//127.0.0.2/control")),
        http(description(control="https://127.0.0.1/control")),
        http(description(control="http://[/control")),
        http(description(control="http://127.0.0.1:99999/control")),
        http(description(control="/control HTTP/1.1\r\nEvil: yes")),
        http(description(control="/" + "x" * 1000)),
        http(description(kind="urn:schemas-upnp-org:service:Printer:1")),
        http(f"<URLBase>http://192.0.2.1/</URLBase>{description()}"),
        http("<s:Fault><errorCode>-1</errorCode></s:Fault>", status=500),
        http("<s:Fault><errorCode>²</errorCode></s:Fault>", status=500),
    ],
)
async def test_a_router_that_answers_nonsense_is_none(answer: bytes) -> None:
    router = FakeRouter(description=answer)
    async with asking(router, search=0.1) as node:
        assert node.forwarding.forwarded is None
    assert router.asked == []


async def test_a_router_is_found_behind_a_device_that_answers_sooner_and_then_says_nothing() -> (
    None
):
    [mute] = await trio.open_tcp_listeners(0, host=HERE)  # the kernel accepts for it
    async with mute:
        router = FakeRouter(rival=f"http://{HERE}:{mute.socket.getsockname()[1]}/")
        async with asking(router, search=0.1) as node:
            assert node.forwarding.forwarded == Forwarded(PORT, router.outer_host)


async def test_a_router_that_says_little_by_little_does_not_keep_us() -> None:
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:

            async def drip(stream: trio.SocketStream) -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        await stream.send_all(b"HTTP/1.1 100 Go on\r\n\r\n")
                        await trio.sleep(0.01)

            [door] = await trio.open_tcp_listeners(0, host=HERE)
            nursery.start_soon(trio.serve_listeners, drip, [door])
            router = FakeRouter(location=f"http://{HERE}:{door.socket.getsockname()[1]}/")
            async with asking(router, ask=0.3) as node:
                assert node.forwarding.forwarded is None
            nursery.cancel_scope.cancel()


async def test_nobody_is_asked_at_the_address_of_another() -> None:
    """Else whoever answers a search could make us knock at doors in our name."""
    knocked = trio.Event()

    async def answer_the_door(stream: trio.SocketStream) -> None:
        knocked.set()
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        [door] = await trio.open_tcp_listeners(0, host="127.0.0.2")
        nursery.start_soon(trio.serve_listeners, answer_the_door, [door])
        port = door.socket.getsockname()[1]
        for url in (
            f"http://127.0.0.2:{port}/",
            f"http://localhost:{port}/",
            f"http://127.0.0.1@127.0.0.2:{port}/",
            f"ftp://127.0.0.1:{port}/",
            "/description.xml",
        ):
            async with asking(FakeRouter(location=url), search=0.1) as node:
                assert node.forwarding.forwarded is None
        assert not knocked.is_set()
        nursery.cancel_scope.cancel()
