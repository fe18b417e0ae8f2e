import logging
from dataclasses import replace
from itertools import pairwise

import pytest
import trio
import trio.testing
from petals.node.membership import INDEX_WRITERS, MembershipSettings
from petals.protocol.announcement import (
    SWARM_KEY,
    Announcement,
    PeerState,
    decode_signed,
    model_key,
    region_keys,
)
from petals.protocol.errors import ModelMismatch, PeerError
from petals.protocol.span import Span
from petals.protocol.swarm import Swarm
from support.announcements import MODEL, NOW, announce, entry, peer_id
from support.members import BLOCKS, Directory, Node, clock

OTHER_MODEL = "cd" * 32


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
def mock_clock() -> trio.testing.MockClock:
    """Time passes when everybody waits, so that a minute takes no time."""
    return trio.testing.MockClock(autojump_threshold=0)


REGIONS = region_keys(MODEL, Span(0, BLOCKS))


async def test_a_member_is_found_by_others_as_long_as_it_lives(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    server, client = Node(directory, 1, Span(6, 12)), Node(directory, 2, None)
    client.membership.watch(MODEL, BLOCKS)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.membership.run)
        own = server.membership.own
        assert own is not None
        assert own.state is PeerState.JOINING
        await nursery.start(client.membership.run)
        for _ in range(10):
            await trio.sleep(30)
            assert client.others() == [peer_id(1)]
        nursery.cancel_scope.cancel()
    await trio.sleep(59)
    await client.membership.refresh(MODEL, BLOCKS)
    await trio.sleep(22)
    assert client.others() == []


async def test_announcements_go_to_the_regions_and_the_lists_every_20_seconds(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    server = Node(directory, 1, Span(6, 12))
    with trio.move_on_after(205):
        await server.membership.run()
    times = sorted({time for time, _ in directory.puts})
    assert len(times) == 11
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert all(18 <= gap <= 22 for gap in gaps)
    assert len(set(gaps)) > 1
    keys = {*REGIONS[:2], model_key("demo"), SWARM_KEY}
    assert {key for _, key in directory.puts} == keys
    sequences = {made.sequence for key in keys for made in directory.said(key)}
    assert len(sequences) == 1


async def test_a_change_is_announced_at_once_but_not_in_a_storm(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    server = Node(directory, 1, Span(0, 4))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.membership.run)
        await trio.sleep(5)
        server.changes["state"] = PeerState.ONLINE
        server.membership.changed()
        await trio.sleep(0.01)
        assert [made.state for made in directory.said(REGIONS[0])] == [PeerState.ONLINE]
        for _ in range(100):
            server.membership.changed()
            await trio.sleep(0.05)
        times = sorted({time for time, _ in directory.puts})
        assert times == [0, 5, pytest.approx(10, abs=0.1)]
        nursery.cancel_scope.cancel()


async def test_a_node_that_moved_tells_its_old_regions_once(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    server = Node(directory, 1, Span(0, 4))
    assert await server.membership.announce() == 3
    server.blocks = Span(16, 20)
    assert await server.membership.announce() == 3
    assert directory.said(REGIONS[0])[0].span == Span(16, 20)
    directory.puts.clear()
    await server.membership.announce()
    assert {key for _, key in directory.puts} == {REGIONS[2], model_key("demo"), SWARM_KEY}


async def test_when_nobody_listens_it_tries_again_soon_and_then_less_often(
    directory: Directory, mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    directory.down = True
    server = Node(directory, 1, Span(0, 4))
    server.membership.watch(MODEL, BLOCKS)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.membership.run)
        await trio.sleep(32)
        times = sorted({time for time, _ in directory.puts})
        assert times == [0, 1, 3, 7, 15, 31]
        assert "is the clock of this machine right?" in caplog.text
        assert "no peer could be reached" in caplog.text
        directory.down = False
        directory.holders = 0
        server.membership.changed()
        await trio.sleep(5)
        assert len({time for time, _ in directory.puts}) == 7  # nobody took it: again at most 20 s
        directory.holders = 2
        await trio.sleep(22)
        assert len({time for time, _ in directory.puts}) == 8
        directory.down = True
        await trio.sleep(22)
        nursery.cancel_scope.cancel()


async def test_a_frozen_directory_holds_nothing_up(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    directory.frozen = True
    server = Node(directory, 1, Span(0, BLOCKS))
    assert await server.membership.announce() == 0
    assert trio.current_time() == 10
    with pytest.raises(PeerError, match=r"cannot find out who serves the model: .*no answer in 10"):
        await server.membership.refresh(MODEL, BLOCKS)
    assert trio.current_time() == 20
    with pytest.raises(PeerError, match="no answer in 10 s"):
        await server.membership.find("demo")
    before = trio.current_time()
    await server.membership.leave()
    assert trio.current_time() - before == 2


async def test_a_node_that_leaves_is_gone_at_once(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    server, client = Node(directory, 1, Span(0, 4)), Node(directory, 2, None)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.membership.run)
            await client.membership.refresh(MODEL, BLOCKS)
            assert client.others() == [peer_id(1)]
            assert len(await client.membership.find("demo")) == 1
            scope.cancel()
            await server.membership.leave()  # whose own scope is cancelled
    await client.membership.refresh(MODEL, BLOCKS)
    assert client.others() == []
    assert await client.membership.find("demo") == []
    directory.puts.clear()
    assert await server.membership.announce() is None
    assert directory.puts == []


async def test_leaving_is_not_held_up_by_an_announcement_that_hangs(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    server = Node(directory, 1, Span(0, BLOCKS), num_blocks=100)
    server.blocks = Span(0, 100)
    await server.membership.announce()
    directory.frozen = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.membership.announce)
        await trio.sleep(1)
        assert directory.busy == MembershipSettings().concurrency
        directory.frozen = False
        await server.membership.leave()
        assert trio.current_time() < 2
        assert {made.state for made in directory.said(SWARM_KEY)} == {PeerState.OFFLINE}
        nursery.cancel_scope.cancel()


async def test_a_node_without_blocks_says_nothing(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    client = Node(directory, 1, None)
    assert client.membership.describe() is None
    with trio.move_on_after(60):
        await client.membership.run()
    await client.membership.leave()
    assert directory.puts == []
    assert client.membership.own is None
    server = Node(directory, 2, Span(0, 4))
    await server.membership.leave()  # it never came
    assert directory.puts == []


async def test_what_a_node_answers_directly_is_news(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    server = Node(directory, 1, Span(0, 4))
    await server.membership.announce()
    swarm = Swarm(peer_id(2))
    for sessions in (0, 1, 2):
        server.changes["sessions"] = sessions
        answer = server.membership.describe()
        assert answer is not None
        assert swarm.update(decode_signed(answer, clock()), clock())
    known = swarm.get(peer_id(1), clock())
    assert known is not None
    assert known.sessions == 2


async def test_a_restarted_node_is_newer_than_it_was(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    before = Node(directory, 1, Span(0, 4))
    for _ in range(5):
        await before.membership.announce()
    await trio.sleep(0.01)
    after = Node(directory, 1, Span(4, 8))
    await after.membership.announce()
    assert [made.span for made in directory.said(REGIONS[0])] == [Span(4, 8)]


async def test_refreshing_reads_every_region_a_few_at_a_time(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    for number, blocks in enumerate([Span(0, 8), Span(8, 16), Span(16, 20)], start=1):
        await Node(directory, number, blocks).membership.announce()
    directory.table[REGIONS[0]] += [b"junk"]
    client = Node(directory, 9, None)
    directory.seconds = 1
    await client.membership.refresh(MODEL, BLOCKS)
    assert sorted(client.others()) == sorted(peer_id(n) for n in (1, 2, 3))
    assert sorted(directory.gets) == sorted(REGIONS)
    await client.membership.refresh(MODEL, 400)
    assert directory.busiest == MembershipSettings().concurrency


async def test_what_does_not_belong_into_a_region_is_ignored(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    directory.table[REGIONS[0]] = [
        entry(1, Span(0, 4), num_blocks=BLOCKS),
        entry(2, Span(0, 4), num_blocks=BLOCKS, model=OTHER_MODEL),
        entry(3, Span(0, 4), num_blocks=BLOCKS + 1),
    ]
    client = Node(directory, 9, None)
    await client.membership.refresh(MODEL, BLOCKS)
    assert client.others() == [peer_id(1)]


async def test_regions_that_cannot_be_read_do_not_hide_the_others(
    directory: Directory, mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Node(directory, 1, Span(0, BLOCKS)).membership.announce()
    whole = directory.get

    async def broken(key: bytes) -> list[bytes]:
        if key != REGIONS[1]:
            raise PeerError("no peer could be reached")
        return await whole(key)

    monkeypatch.setattr(directory, "get", broken)
    client = Node(directory, 9, None)
    await client.membership.refresh(MODEL, BLOCKS)
    assert client.others() == [peer_id(1)]


async def test_callers_share_a_refresh(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    await Node(directory, 1, Span(0, 4)).membership.announce()
    client = Node(directory, 9, None)
    directory.seconds = 1
    done: list[float] = []

    async def ask(delay: float, patience: float = 60) -> None:
        await trio.sleep(delay)
        with trio.move_on_after(patience):
            await client.membership.refresh(MODEL, BLOCKS)
            done.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for delay in (0, 0.3, 0.6):
            nursery.start_soon(ask, delay)
    assert done == [1, 1, 1]
    assert len(directory.gets) == len(REGIONS)
    # who waits for somebody that gives up takes over
    done.clear()
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 0, 0.5)
        nursery.start_soon(ask, 0.2)
        nursery.start_soon(ask, 0.3)
    assert [time - start for time in done] == [1.5, 1.5]
    # a failure is everybody's
    directory.down = True
    errors: list[str] = []

    async def fail(delay: float) -> None:
        await trio.sleep(delay)
        try:
            await client.membership.refresh(MODEL, BLOCKS)
        except PeerError as error:
            errors.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail, 0)
        nursery.start_soon(fail, 0.5)
    assert errors == ["cannot find out who serves the model: no peer could be reached"] * 2


async def test_what_was_read_a_moment_ago_need_not_be_read_again(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    client = Node(directory, 9, None)
    for max_age, reads in ((5.0, 1), (5.0, 1), (0.0, 2)):
        await client.membership.refresh(MODEL, BLOCKS, max_age=max_age)
        assert len(directory.gets) == reads * len(REGIONS)
    await trio.sleep(5)
    await client.membership.refresh(MODEL, BLOCKS, max_age=5.0)
    assert len(directory.gets) == 3 * len(REGIONS)


async def test_models_are_found_by_name_and_without_one(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    await Node(directory, 1, Span(0, 4)).membership.announce()
    await Node(directory, 2, Span(0, 4), model=OTHER_MODEL).membership.announce()
    await Node(directory, 3, Span(0, 4), model="ef" * 32, model_name="x").membership.announce()
    client = Node(directory, 9, None).membership

    def who(found: list[Announcement]) -> set[str]:
        return {peer.peer_id for peer in found}

    assert who(await client.find("demo")) == {peer_id(1), peer_id(2)}
    assert who(await client.find()) == {peer_id(1), peer_id(2), peer_id(3)}
    directory.table[model_key("demo")] = directory.table[SWARM_KEY]
    assert who(await client.find("demo")) == {peer_id(1), peer_id(2)}
    await client.check_model("demo", MODEL)
    await client.check_model("unheard of", MODEL)
    with pytest.raises(ModelMismatch, match=r"fingerprint ffffffffffffffff.*abababab.*\(1 peer\)"):
        await client.check_model("demo", "ff" * 32)


async def test_what_the_holders_have_counted_is_read(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    client = Node(directory, 9, None).membership
    assert await client.totals(MODEL, BLOCKS) is None, "nobody has counted anything"
    await Node(directory, 1, Span(0, 10), state=PeerState.ONLINE).membership.announce()
    await Node(directory, 2, Span(0, 10), moving_to=Span(10, 20)).membership.announce()
    totals = await client.totals(MODEL, BLOCKS)
    assert totals is not None
    assert totals.serving == (10.0,) * 10 + (0.0,) * 10
    assert totals.loading == (0.0,) * 10 + (10.0,) * 10, "it counts where it moves to"
    directory.down = True
    assert await client.totals(MODEL, BLOCKS) is None


async def test_the_lists_are_written_by_a_sample_of_a_large_swarm(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    server = Node(directory, 1, Span(0, 4))
    one = announce(2, Span(0, 4))
    for number in range(8 * INDEX_WRITERS):
        server.swarm.update(replace(one, peer_id=f"peer {number}", expires_at=NOW + 1e6), NOW)
    for _ in range(400):
        await server.membership.announce()
    listed = sum(key == SWARM_KEY for _, key in directory.puts)
    assert sum(key == REGIONS[0] for _, key in directory.puts) == 400
    assert 25 <= listed <= 75


async def test_the_view_forgets_who_expired(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    client = Node(directory, 9, None)
    client.swarm.update(announce(1, Span(0, 4)), clock())
    with trio.move_on_after(90):
        await client.membership.run()
    assert repr(client.swarm) == "<Swarm of 0 peers, 0 avoided, 0 banned>"


async def test_in_a_large_swarm_a_member_announces_and_reads_less_often(
    directory: Directory, mock_clock: trio.testing.MockClock
) -> None:
    crowd = [
        entry(number, Span(0, 8), num_blocks=BLOCKS, expires_at=NOW + 300)
        for number in range(2, 252)
    ]
    directory.table[REGIONS[0]] = crowd
    server = Node(directory, 1, Span(0, 4))
    server.membership.watch(MODEL, BLOCKS)
    await server.membership.refresh(MODEL, BLOCKS)
    directory.gets.clear()
    with trio.move_on_after(220):
        await server.membership.run()
    assert server.membership.upkeep.announce_interval == 50
    assert len({time for time, _ in directory.puts}) == 5
    assert sorted(directory.gets) == sorted(REGIONS)
    own = server.membership.own
    assert own is not None
    assert 100 < own.expires_at - clock() <= 150
