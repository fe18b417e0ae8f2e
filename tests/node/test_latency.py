"""Measuring the ways to others, over networks in memory."""

import contextlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing
from petals.node import describe
from petals.node.latency import AT_ONCE, FIRST_INTERVAL, INTERVAL, LatencyWatch
from petals.protocol.announcement import Announcement, encode_signed
from petals.protocol.coordinates import Coordinate
from petals.protocol.errors import PeerError
from petals.protocol.expected import Expected
from petals.protocol.frames import DESCRIBE_PROTOCOL, PROTOCOL_VERSION, Hello
from petals.protocol.round_trips import FRESH
from petals.protocol.span import Span
from support.announcements import NOW, announce, dice, peer_id, signer
from support.memory_network import (
    CountingEntries,
    MemoryNetwork,
    MemorySwarm,
    expiring_merge,
)

HELLO = Hello(PROTOCOL_VERSION, "test")
US = peer_id(99)
SPAN = Span(4, 8)


class World:
    """One node that measures, and others that describe themselves."""

    def __init__(self) -> None:
        self.swarm = MemorySwarm(expiring_merge, lambda: NOW, CountingEntries)
        self.candidates: list[Announcement] = []
        self.asked: list[tuple[float, str]] = []
        self.heard: list[str] = []
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "World":
        await self._stack.__aenter__()
        self.network: MemoryNetwork = await self._stack.enter_async_context(
            self.swarm.network(US, serve=False)
        )
        self.watch = LatencyWatch(
            self.network,
            candidates=lambda: self.candidates,
            ask=self.ask,
            heard=lambda peer: self.heard.append(peer.peer_id),
            dice=dice(),
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def peer(
        self, number: int, round_trip: float = 0.001, *, there: bool = True, **says: Any
    ) -> str:
        """A candidate; one that is not there was announced and has died."""
        who = peer_id(number)
        self.swarm.round_trips[who] = round_trip
        addresses: Sequence[str] = (f"/ip4/10.0.0.1/tcp/1/p2p/{who}",)
        if there:
            network = await self._stack.enter_async_context(self.swarm.network(who))
            addresses = network.multiaddrs
            said = encode_signed(announce(number, SPAN, **says), signer(number))

            async def answer(stream: object) -> None:
                await describe.answer(
                    stream,  # type: ignore[arg-type]
                    HELLO,
                    announcement=lambda: said,
                    figures=dict,
                    expected=Expected(),
                )

            network.handle(DESCRIBE_PROTOCOL, answer)
        self.candidates.append(announce(number, SPAN, multiaddrs=tuple(addresses), **says))
        return who

    async def ask(
        self, who: str, multiaddrs: Sequence[str]
    ) -> tuple[Announcement | None, Mapping[str, float]]:
        self.asked.append((trio.current_time(), who))
        return await describe.ask(self.network, who, multiaddrs, HELLO, now=NOW)


@pytest.fixture
def mock_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


async def test_candidates_are_measured_and_heard(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with World() as world:
        near, far = await world.peer(1, 0.01), await world.peer(2, 0.2)
        assert await world.watch.turn()
        assert world.watch.nearest({near, far}, 16) == {near: 0.01, far: 0.2}
        assert world.watch.nearest({near, far}, 1) == {near: 0.01}
        assert list(world.watch.measured()) == [near, far]
        assert sorted(world.heard) == sorted([near, far])


async def test_what_was_measured_pulls_the_node_to_its_place(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with World() as world:
        assert world.watch.coordinate == Coordinate()
        await world.peer(1, 0.2)
        await world.watch.turn()
        assert world.watch.coordinate == Coordinate(), "the peer has not said where it is"
        known = Coordinate((0.3, 0.0, 0.0), 0.01, 0.05)
        await world.peer(2, 0.1, coordinate=known)
        for _ in range(20):
            await world.watch.turn()
        assert world.watch.coordinate.distance(known) == pytest.approx(0.1, rel=0.2)
        assert world.watch.coordinate.error < 0.2


async def test_what_was_opened_for_measuring_is_closed_again(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with World() as world:
        ours, used, idle = [await world.peer(number) for number in (1, 2, 3)]
        await world.network.join([peer.multiaddrs[0] for peer in world.candidates[:1]])
        await world.watch.turn()
        assert set(world.network.connected_peers()) == {ours, used, idle}
        await world.network.open_stream(used, (), DESCRIBE_PROTOCOL)
        await world.watch.turn()
        assert set(world.network.connected_peers()) == {ours, used}
        assert set(world.watch.known()) == {ours, used, idle}


async def test_one_that_is_not_there_is_left_alone_for_a_while(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with World() as world:
        gone = await world.peer(1, there=False)
        assert await world.watch.turn()
        assert await world.watch.turn()
        assert [who for _, who in world.asked] == [gone]
        assert world.watch.known() == {}


async def test_a_few_at_a_time_soon_at_first_and_then_seldom(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with World() as world:
        peers = {await world.peer(number) for number in range(1, 11)}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.watch.run)
            await trio.sleep(FRESH - INTERVAL)
            nursery.cancel_scope.cancel()
        assert {who for _, who in world.asked} == peers
        assert len(world.asked) == len(peers)  # each once, as long as its figure is fresh
        times = sorted({time for time, _ in world.asked})
        assert len(times) == -(-len(peers) // AT_ONCE)
        assert all(later - time >= 0.9 * INTERVAL for time, later in pairwise(times))


async def test_candidates_that_come_later_are_measured_soon(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with World() as world:
        late = await world.peer(1)
        candidates, world.candidates = world.candidates, []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.watch.run)
            await trio.sleep(100)
            world.candidates = candidates
            began = trio.current_time()
            await trio.sleep(1.2 * FIRST_INTERVAL)
            assert list(world.watch.measured()) == [late]
            assert world.asked[0][0] - began < 1.2 * FIRST_INTERVAL
            nursery.cancel_scope.cancel()


async def test_a_bug_of_a_peer_ends_nothing(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with World() as world:
        silent = await world.peer(1)

        async def hang_up(stream: object) -> None:
            raise PeerError("no")

        world.swarm.networks[silent].handle(DESCRIBE_PROTOCOL, hang_up)
        assert await world.watch.turn()
        assert world.watch.nearest({silent}, 16) == {}
