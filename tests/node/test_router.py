"""What a new session asks of its candidates before it opens, and what a recovery doesn't."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import trio
import trio.testing
from petals.node.membership import Membership
from petals.node.router import ASK_TIMEOUT, CHOICE_TIMEOUT, SwarmRouter
from petals.protocol.announcement import Announcement, PeerState
from petals.protocol.coordinates import Coordinate
from petals.protocol.errors import NoRoute, PeerError
from petals.protocol.expected import EXPECTED_BLOCKS
from petals.protocol.routing import RouteHop
from petals.protocol.span import Span
from petals.protocol.swarm import Swarm
from support.announcements import MODEL, NOW, announce, dice, peer_id, signer

BLOCKS = Span(0, 8)
FAST, MIDDLE, SLOW = (
    announce(number, BLOCKS, decode_speed=speed)
    for number, speed in ((1, 400.0), (2, 200.0), (3, 100.0))
)


def clock() -> float:
    return NOW + trio.current_time()


class NoDirectory:
    """A swarm that answers nobody."""

    async def put(self, key: bytes, entry: bytes) -> int:
        raise PeerError("nobody is there")

    async def get(self, key: bytes) -> list[bytes]:
        raise PeerError("nobody is there")

    async def sums(self, key: bytes) -> list[bytes]:
        raise PeerError("nobody is there")


class World:
    """A router that knows some peers, and what they say when they are asked."""

    def __init__(self, *announced: Announcement) -> None:
        self.swarm = Swarm(peer_id(99))
        for peer in announced:
            self.swarm.update(peer, clock())
        self.says: dict[str, Announcement | None] = {}
        self.expects: dict[str, int] = {}
        self.frozen: set[str] = set()
        self.asked: list[tuple[str, int | None]] = []
        membership = Membership(
            NoDirectory(),
            self.swarm,
            sign=signer(99),
            describe=lambda *_: None,
            clock=clock,
            dice=dice(),
        )
        self.router = SwarmRouter(
            membership,
            self.swarm,
            model_name="demo",
            fingerprint=MODEL,
            num_blocks=len(BLOCKS),
            round_trips=dict,
            coordinate=Coordinate,
            ask=self.ask,
            ourselves=lambda: None,
            clock=clock,
            dice=dice(),
        )

    def changed(self, peer: Announcement, **changes: object) -> None:
        """Have a peer say something else than it has announced."""
        self.says[peer.peer_id] = replace(peer, sequence=peer.sequence + 1, **changes)  # type: ignore[arg-type]

    async def ask(
        self, asked: str, multiaddrs: Sequence[str], *, blocks: int | None
    ) -> tuple[Announcement | None, Mapping[str, float]]:
        assert multiaddrs
        self.asked.append((asked, blocks))
        if asked in self.frozen:
            await trio.sleep_forever()
        if asked not in self.says:
            raise PeerError("it is not there", peer_id=asked)
        return self.says[asked], {EXPECTED_BLOCKS: self.expects.get(asked, 0)}

    async def route(
        self, span: Span = BLOCKS, *, source: str | None = None, cache_tokens: int = 100
    ) -> list[str]:
        hops: Sequence[RouteHop] = await self.router.route(
            span,
            cache_tokens=cache_tokens,
            exclude=frozenset(),
            source=source,
            sink=None,
            fresh=False,
        )
        return [hop.peer_id for hop in hops]


@pytest.fixture
def mock_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


async def test_the_chosen_hops_are_asked_what_they_carry(
    mock_clock: trio.testing.MockClock,
) -> None:
    world = World(FAST, MIDDLE, SLOW)
    world.changed(FAST)
    assert await world.route() == [FAST.peer_id]
    assert world.asked == [(FAST.peer_id, 8)]


async def test_one_that_has_become_busy_is_left_to_others(
    mock_clock: trio.testing.MockClock,
) -> None:
    world = World(FAST, MIDDLE, SLOW)
    world.changed(FAST, session_blocks=80)
    world.changed(MIDDLE)
    assert await world.route() == [MIDDLE.peer_id]
    assert [asked for asked, _ in world.asked] == [FAST.peer_id, MIDDLE.peer_id]


async def test_one_that_others_are_about_to_use_is_as_good_as_busy(
    mock_clock: trio.testing.MockClock,
) -> None:
    world = World(FAST, MIDDLE)
    world.changed(FAST)
    world.changed(MIDDLE)
    world.expects[FAST.peer_id] = 80
    assert await world.route() == [MIDDLE.peer_id]


async def test_one_that_is_leaving_or_full_or_gone_is_passed_over(
    mock_clock: trio.testing.MockClock,
) -> None:
    world = World(FAST, MIDDLE, SLOW)
    world.changed(FAST, state=PeerState.DRAINING)
    world.changed(MIDDLE, cache_tokens_left=99)
    world.changed(SLOW)
    assert await world.route() == [SLOW.peer_id]
    gone = World(FAST, MIDDLE)
    gone.changed(MIDDLE)
    assert await gone.route() == [MIDDLE.peer_id]
    assert gone.swarm.failures(FAST.peer_id) == 1
    serving_nothing = World(FAST, MIDDLE)
    serving_nothing.says[FAST.peer_id] = None
    serving_nothing.changed(MIDDLE)
    assert await serving_nothing.route() == [MIDDLE.peer_id]


async def test_one_that_hangs_costs_two_seconds_and_is_not_blamed(
    mock_clock: trio.testing.MockClock,
) -> None:
    world = World(FAST, MIDDLE, SLOW)
    world.frozen = {FAST.peer_id}
    world.changed(MIDDLE)
    assert await world.route() == [MIDDLE.peer_id]
    assert trio.current_time() == ASK_TIMEOUT
    assert world.swarm.failures(FAST.peer_id) == 0
    world.frozen = {FAST.peer_id, MIDDLE.peer_id}
    began = trio.current_time()
    assert await world.route() == [MIDDLE.peer_id]
    assert trio.current_time() - began == CHOICE_TIMEOUT


async def test_a_recovery_asks_nobody(mock_clock: trio.testing.MockClock) -> None:
    world = World(FAST, MIDDLE, SLOW)
    assert await world.route(Span(2, 8), source=peer_id(9)) == [FAST.peer_id]
    assert world.asked == []


async def test_nobody_at_all_is_said_at_once(mock_clock: trio.testing.MockClock) -> None:
    with pytest.raises(NoRoute, match="0:8 of demo are served by nobody"):
        await World().route()
