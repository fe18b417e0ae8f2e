"""What a node's choice of blocks is made of, in swarms that it can know and in those that it cannot."""

from collections.abc import Sequence

import pytest
import trio
from petals.node.placing import Placing
from petals.protocol.announcement import Announcement, region_keys
from petals.protocol.errors import PeerError
from petals.protocol.span import Span
from petals.protocol.upkeep import FULL
from support.announcements import MODEL, NOW, announce, dice, entry
from support.members import BLOCKS, Directory, Node, clock
from trio.testing import MockClock

REGIONS = region_keys(MODEL, Span(0, BLOCKS))


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
def mock_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


def placing(directory: Directory, own: Span | None = None, *, capacity: int = 10) -> Placing:
    member = Node(directory, 1, own)

    def ourselves() -> Announcement | None:
        if own is None:
            return None
        return announce(1, own, num_blocks=BLOCKS)

    return Placing(
        member.membership,
        member.swarm,
        fingerprint=MODEL,
        num_blocks=BLOCKS,
        capacity_blocks=capacity,
        ourselves=ourselves,
        clock=clock,
        dice=dice(),
    )


def fill(directory: Directory, spans: Sequence[Span], expires_at: float = NOW + 300) -> None:
    """One peer for each span."""
    directory.table = {key: [] for key in REGIONS}
    for number, blocks in enumerate(spans, start=2):
        said = entry(number, blocks, num_blocks=BLOCKS, expires_at=expires_at)
        for key in region_keys(MODEL, blocks):
            directory.table[key].append(said)


async def test_who_joins_goes_where_the_swarm_is_weakest(
    directory: Directory, mock_clock: MockClock
) -> None:
    fill(directory, [Span(0, 10), Span(0, 10), Span(10, 20)])
    assert await placing(directory).choose() == Span(10, 20)


async def test_who_is_the_first_serves_what_it_can(
    directory: Directory, mock_clock: MockClock
) -> None:
    directory.down = True
    assert len(await placing(directory).choose()) == 10


async def test_in_a_large_swarm_it_goes_by_what_the_holders_have_counted(
    directory: Directory, mock_clock: MockClock
) -> None:
    fill(directory, [Span(0, 10)] * (2 * FULL) + [Span(10, 20)] * (FULL + 100))
    directory.shown = FULL + 50  # as many of both, by what can be read
    joining = placing(directory, capacity=4)
    chosen = await joining.choose()
    assert chosen.start >= 10
    assert joining.interval() > 60


async def test_a_node_of_a_large_swarm_moves_by_that_too(
    directory: Directory, mock_clock: MockClock
) -> None:
    fill(directory, [Span(0, 10)] * (2 * FULL) + [Span(10, 20)] * (FULL + 100))
    directory.shown = FULL + 50
    serving = placing(directory, Span(0, 10))
    move = await serving.look()
    assert move is not None
    assert move.span == Span(10, 20)
    reads = len(directory.gets)
    await serving.know_anew()
    assert await serving.look() == move
    assert len(directory.gets) == reads, "it only asks for the sums again"
    directory.down = True
    assert await serving.look() is None, "of whom nothing is known nobody can be helped"


async def test_whoever_looks_seldom_reads_first(
    directory: Directory, mock_clock: MockClock
) -> None:
    even = [Span(0, 10), Span(10, 20)] * 60
    fill(directory, even, NOW + 72)
    serving = placing(directory, Span(0, 10))
    assert await serving.look() is None
    await trio.sleep(40)
    reads = len(directory.gets)
    assert await serving.look() is None
    assert len(directory.gets) == reads, "nobody can have expired yet"
    await trio.sleep(40)
    fill(directory, even, NOW + 152)
    assert await serving.look() is None, "those who have expired are still there"
    assert len(directory.gets) == 2 * reads
    await serving.know_anew()
    assert len(directory.gets) == 3 * reads
    await trio.sleep(80)
    directory.down = True
    with pytest.raises(PeerError):
        await serving.look()


async def test_who_serves_nothing_goes_nowhere(directory: Directory, mock_clock: MockClock) -> None:
    serving_nothing = placing(directory)
    assert await serving_nothing.look() is None
    assert serving_nothing.interval() == 5
