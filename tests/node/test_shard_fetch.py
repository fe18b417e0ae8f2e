"""Shards from peers that give them, fail, lie, or never end; over networks in memory."""

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random  # noqa: TID251 - tests throw dice with known seeds

import pytest
import trio
from petals.node import shard_fetch, shard_server
from petals.node.frame_stream import FrameStream, open_frame_stream
from petals.node.network import Network, Stream
from petals.node.shard_fetch import Fetching, ReadOwn, ShardFetch, fetch_manifest
from petals.node.shard_server import Holder, ShardServer
from petals.node.shard_store import ShardStore
from petals.node.uploads import Uploads
from petals.protocol.announcement import Announcement
from petals.protocol.errors import (
    ErrorCode,
    ModelError,
    PeerError,
    RemoteProtocolError,
)
from petals.protocol.frames import (
    PROTOCOL_VERSION,
    SHARD_PROTOCOL,
    Chunk,
    Failed,
    Frame,
    Hello,
    Holdings,
    ManifestPart,
    NoChunk,
    Probe,
    Refused,
    WantChunk,
    WantHoldings,
    WantManifest,
)
from petals.protocol.holdings import everything, join
from petals.protocol.manifest import ENDS, FILES, FIRST_BLOCK, MIN_CHUNK
from petals.protocol.span import Span
from petals.protocol.swarm import Swarm
from support.announcements import announce
from support.models import RandomModel
from support.networks import MemoryWorld

HELLO = Hello(PROTOCOL_VERSION, "test")
MODEL = RandomModel()
MANIFEST = MODEL.manifest
ALL = range(len(MANIFEST.shards))
BLOCK = FIRST_BLOCK

Handler = Callable[[Stream], Awaitable[None]]


@dataclass
class World:
    """A node that fetches, and the peers that it knows of."""

    memory: MemoryWorld
    network: Network
    store: ShardStore
    swarm: Swarm
    peers: list[Announcement] = field(default_factory=list)
    looked: trio.Event = field(default_factory=trio.Event)
    progress: Fetching = field(default_factory=lambda: Fetching("blocks", MANIFEST.size, 0))

    @asynccontextmanager
    async def peer(self, handler: Handler) -> AsyncIterator[str]:
        """Somebody who gives weights in this way; his peer id."""
        async with self.memory.network() as network:
            network.handle(SHARD_PROTOCOL, handler)
            said = replace(
                announce(1, Span(0, 3)), peer_id=network.peer_id, multiaddrs=network.multiaddrs
            )
            self.peers.append(said)
            yield network.peer_id

    async def fetch(
        self, *numbers: int, fallback: ReadOwn | None = None, patience: float = math.inf
    ) -> None:
        """Fetch these shards to the end."""

        async def find() -> list[Announcement]:
            self.looked.set()
            return self.peers

        missing = {}
        for number in numbers:
            count = MANIFEST.shards[number].num_chunks
            missing[number] = set(range(count)) - self.store.open(number)
        fetch = ShardFetch(
            self.store,
            network=self.network,
            swarm=self.swarm,
            hello=HELLO,
            find=find,
            clock=self.memory.clock,
            dice=Random(1),
            fallback=fallback,
        )
        with trio.fail_after(60):
            await fetch.run(missing, self.progress, patience=patience)

    def is_right(self, *numbers: int) -> bool:
        """Whether these shards are on the disk as they should be."""
        again = ShardStore(self.store.shards.parent, MANIFEST)
        return all(
            again.open(number) == set(range(MANIFEST.shards[number].num_chunks))
            for number in numbers
        )


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(shard_fetch, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(shard_fetch, "ASK_SECONDS", 0.05)
    memory = MemoryWorld()
    async with memory.network() as network:
        store = ShardStore(tmp_path, MANIFEST)
        yield World(memory, network, store, Swarm(network.peer_id))


def giver(holder: Holder = MODEL) -> Handler:
    """An honest peer."""
    return ShardServer(holder, Uploads(None, lambda: 0.0), HELLO).handle


@dataclass
class Some:
    """A holder of some chunks of the first block."""

    chunks: bytes
    manifest = MANIFEST

    def bits(self, number: int) -> bytes:
        return self.chunks if number == BLOCK else b""

    def read(self, number: int, chunk: int) -> bytes | None:
        return MODEL.read(number, chunk)


class Peer:
    """A peer that answers as a test likes."""

    def __init__(self, *, answer: Callable[[WantChunk], list[Frame]]) -> None:
        self._answer = answer
        self.streams = 0

    async def __call__(self, stream: Stream) -> None:
        self.streams += 1
        frames = FrameStream(stream, HELLO)
        try:
            while (asked := await frames.receive()) is not None:
                await frames.send(*self.answers(asked))
        except (PeerError, RemoteProtocolError):
            return

    def answers(self, asked: Frame) -> list[Frame]:
        match asked:
            case WantHoldings(_, numbers):
                counts = [MANIFEST.shards[number].num_chunks for number in numbers]
                return [Holdings(join(map(everything, counts)))]
            case WantChunk():
                return self._answer(asked)
        raise AssertionError(asked)


def right(asked: WantChunk) -> bytes:
    return MODEL.read(asked.shard, asked.chunk)


def chunk(asked: WantChunk, data: bytes) -> list[Frame]:
    return [Chunk(asked.shard, asked.chunk, data)]


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


# --- who gives --------------------------------------------------------------------------------------


async def test_everything_comes_from_one_peer(world: World) -> None:
    async with world.peer(giver()) as seed:
        await world.fetch(*ALL)
    assert world.is_right(*ALL)
    assert world.progress.received == {seed: MANIFEST.size}
    assert world.progress.done == MANIFEST.size


async def test_several_peers_give_what_each_of_them_has(world: World) -> None:
    async with world.peer(giver(Some(b"\x03"))) as one, world.peer(giver(Some(b"\x0c"))) as two:
        await world.fetch(BLOCK)
    assert world.is_right(BLOCK)
    assert world.progress.received == {one: 2 * MIN_CHUNK, two: MIN_CHUNK + MIN_CHUNK // 2}


async def test_who_fetches_gives_what_it_has_got_so_far(world: World, tmp_path: Path) -> None:
    class Growing(Some):
        def bits(self, number: int) -> bytes:
            bits = super().bits(number)
            self.chunks = bytes([(self.chunks[0] << 1 | 1) & 0x0F])
            return bits

    async with world.peer(giver(Growing(b"\x01"))):
        await world.fetch(BLOCK)
    assert world.is_right(BLOCK)


async def test_what_is_there_already_is_not_fetched(world: World) -> None:
    world.store.open(BLOCK)
    for number in (0, 1, 2):
        world.store.write(BLOCK, number, MODEL.read(BLOCK, number))
    async with world.peer(giver()) as seed:
        await world.fetch(BLOCK)
    assert world.progress.received == {seed: MIN_CHUNK // 2}
    await world.fetch(BLOCK)


async def test_a_peer_that_comes_later_is_found(world: World) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.fetch, BLOCK)
        await world.looked.wait()
        async with world.peer(giver()):
            while not world.is_right(BLOCK):  # noqa: ASYNC110 - files have no event for it
                await trio.sleep(0.01)


async def test_what_a_peer_has_no_more_comes_from_another(world: World) -> None:
    forgetful = Peer(answer=lambda asked: [NoChunk(asked.shard, asked.chunk)])
    async with world.peer(forgetful), world.peer(giver()) as seed:
        await world.fetch(BLOCK)
    assert list(world.progress.received) == [seed]
    assert not world.swarm.banned


async def test_a_peer_that_refuses_or_fails_is_left_alone_for_a_while(world: World) -> None:
    busy = Peer(answer=lambda asked: [Refused(ErrorCode.BUSY, "full", 30.0)])
    broken = Peer(answer=lambda asked: [Failed(ErrorCode.OTHER, "no")])
    async with world.peer(busy) as one, world.peer(broken) as two, world.peer(giver()) as seed:
        await world.fetch(*ALL)
        now = world.memory.clock()
        assert not world.swarm.usable(one, now)
        assert not world.swarm.usable(two, now)
    assert list(world.progress.received) == [seed]
    assert not world.swarm.banned


async def test_a_peer_with_nothing_to_give_keeps_no_other_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_fetch, "PEERS_AT_ONCE", 1)
    monkeypatch.setattr(shard_fetch, "PASSED_OVER_SECONDS", 0.1)
    async with world.peer(giver(Some(b""))), world.peer(giver()) as seed:
        await world.fetch(BLOCK)
    assert list(world.progress.received) == [seed]
    assert not world.swarm.banned


async def test_what_nobody_gives_is_given_up_in_words(world: World) -> None:
    async with world.peer(giver(Some(b"\x03"))):
        with pytest.raises(PeerError, match=r"what is missing of the model's blocks \(0.1 MB\)"):
            await world.fetch(BLOCK, patience=0.5)


async def test_what_nobody_has_comes_from_the_fallback(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_fetch, "FALLBACK_SECONDS", 0.2)
    async with world.peer(giver(Some(b"\x03"))) as peer_id:
        await world.fetch(*ALL, fallback=MODEL.read)
    assert world.is_right(*ALL)
    assert world.progress.received == {
        peer_id: 2 * MIN_CHUNK,
        "": MANIFEST.size - 2 * MIN_CHUNK,
    }


async def test_what_the_fallback_lacks_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_fetch, "FALLBACK_SECONDS", 0.05)
    asked = trio.Event()

    def read(number: int, chunk: int) -> bytes:
        if number == BLOCK:
            trio.from_thread.run_sync(asked.set)
            raise ModelError("the folder holds no such file")
        return MODEL.read(number, chunk)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(world.fetch, ENDS, BLOCK, fallback=read))
        await asked.wait()
        async with world.peer(giver(Some(b"\x0f"))):
            while not world.is_right(ENDS, BLOCK):  # noqa: ASYNC110 - files have no event for it
                await trio.sleep(0.01)
    assert world.progress.received[""] == MANIFEST.shards[ENDS].size


async def test_a_fallback_that_is_another_model_is_not_taken(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_fetch, "FALLBACK_SECONDS", 0.01)
    with pytest.raises(ModelError, match="another model"):
        await world.fetch(BLOCK, fallback=RandomModel(seed=5).read)
    assert not list(world.store.shards.iterdir())


# --- who lies ---------------------------------------------------------------------------------------


def lies() -> dict[str, Callable[[WantChunk], list[Frame]]]:
    return {
        "corrupted": lambda asked: chunk(asked, flipped(right(asked))),
        "another's": lambda asked: chunk(asked, right(replace(asked, shard=asked.shard ^ 1))),
        "truncated": lambda asked: chunk(asked, right(asked)[:-1]),
        "empty": lambda asked: chunk(asked, b""),
        "too long": lambda asked: chunk(asked, right(asked) + b"\0"),
        "far too long": lambda asked: chunk(asked, bytes(20 * MIN_CHUNK)),
        "not asked for": lambda asked: [Chunk(asked.shard, 77, right(asked))],
        "lacking what was not asked for": lambda asked: [NoChunk(asked.shard, 77)],
        "without end": lambda asked: chunk(asked, right(asked)) * 50,
        "holdings without end": lambda asked: [Holdings(b"")] * 50,
        "holdings of another size": lambda asked: [Holdings(bytes(9999))],
        "something else": lambda asked: [Probe(1)],
    }


@pytest.mark.parametrize("lie", lies())
async def test_a_liar_is_banned_and_others_give(world: World, lie: str) -> None:
    liar = Peer(answer=lies()[lie])
    async with world.peer(liar) as peer_id, trio.open_nursery() as nursery:
        nursery.start_soon(world.fetch, BLOCK, BLOCK + 1)
        with trio.fail_after(10):
            while peer_id not in world.swarm.banned:  # noqa: ASYNC110 - no event for it
                await trio.sleep(0.01)
        async with world.peer(giver()):
            while not world.is_right(BLOCK, BLOCK + 1):  # noqa: ASYNC110 - the same
                await trio.sleep(0.01)
    assert liar.streams == 1, "never asked again"


async def test_bytes_that_are_no_frames_are_a_lie(world: World) -> None:
    async def rave(stream: Stream) -> None:
        while True:
            await stream.send([bytes(range(256)) * 100])

    async with world.peer(rave) as peer_id, world.peer(giver()):
        await world.fetch(*ALL)
        assert world.swarm.banned == {peer_id}


async def test_a_peer_that_ends_in_the_middle_of_a_chunk_is_left_alone_for_a_while(
    world: World,
) -> None:
    class Cut(Peer):
        async def __call__(self, stream: Stream) -> None:
            frames = FrameStream(stream, HELLO)
            while (asked := await frames.receive()) is not None:
                if isinstance(asked, WantChunk):
                    await stream.send([(70_000).to_bytes(4, "big") + bytes(1000)])
                    await stream.close()
                    return
                await frames.send(*self.answers(asked))

    async with world.peer(Cut(answer=lambda asked: [])) as peer_id, world.peer(giver()):
        await world.fetch(*ALL)
        assert not world.swarm.banned
        assert not world.swarm.usable(peer_id, world.memory.clock())


async def test_a_peer_that_sends_nothing_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petals.protocol.download.PATIENCE", -2.0)
    async with world.peer(Peer(answer=lambda asked: [])) as peer_id, trio.open_nursery() as nursery:
        nursery.start_soon(world.fetch, BLOCK)
        while world.swarm.usable(peer_id, world.memory.clock()):  # noqa: ASYNC110 - no event for it
            await trio.sleep(0.01)
        async with world.peer(giver()):
            while not world.is_right(BLOCK):  # noqa: ASYNC110 - files have no event for it
                await trio.sleep(0.01)


async def test_a_peer_that_cannot_be_reached_is_passed_over(world: World) -> None:
    async with world.peer(giver()):
        pass
    async with world.peer(giver()) as seed:
        await world.fetch(BLOCK)
    assert list(world.progress.received) == [seed]


# --- manifests --------------------------------------------------------------------------------------


async def manifest_from(world: World, handler: Handler) -> object:
    async with world.peer(handler):
        return await fetch_manifest(world.network, world.peers[-1], MANIFEST.fingerprint, HELLO)


async def test_a_manifest_comes_in_pieces(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for side in (shard_server, shard_fetch):
        monkeypatch.setattr(side, "PART_BYTES", 100)
    assert await manifest_from(world, giver()) == MANIFEST


@pytest.mark.parametrize(
    "parts",
    [
        [ManifestPart(50, 0, b"")],
        [ManifestPart(50, 0, b"a")],
        [ManifestPart(50, 1, b"abc")],
        [ManifestPart(2, 0, b"abc")],
        [ManifestPart(5, 0, b"abc"), ManifestPart(6, 3, b"abc")],
        [ManifestPart(3, 0, b"abc")],
        [Probe(1)],
        [ManifestPart(1 << 24, 0, bytes(3 << 20))],
    ],
    ids=[
        "empty",
        "bit by bit",
        "from elsewhere",
        "too long",
        "growing",
        "wrong",
        "none",
        "oversized",
    ],
)
async def test_a_wrong_manifest_is_refused(world: World, parts: list[Frame]) -> None:
    async def lie(stream: Stream) -> None:
        frames = FrameStream(stream, HELLO)
        for part in parts:
            await frames.receive()
            await frames.send(part)
        await frames.receive()

    with pytest.raises(RemoteProtocolError):
        await manifest_from(world, lie)


async def test_a_peer_without_the_model_says_so(world: World) -> None:
    with pytest.raises(PeerError, match="this node has nothing of"):
        await manifest_from(world, giver(RandomModel(seed=3)))


# --- the giving side --------------------------------------------------------------------------------


async def asked(world: World, *wants: Frame, holder: Holder = MODEL) -> list[Frame]:
    """What an honest peer answers."""
    answers: list[Frame] = []
    async with world.peer(giver(holder)) as peer_id:
        frames = await open_frame_stream(
            world.network, peer_id, world.peers[-1].multiaddrs, SHARD_PROTOCOL, HELLO
        )
        await frames.send(*wants)
        for _ in wants:
            answer = await frames.receive()
            assert answer is not None
            answers.append(answer)
        await frames.close()
    return answers


async def test_answers_come_in_the_order_of_the_questions(world: World) -> None:
    model = MANIFEST.fingerprint
    wants = [WantChunk(model, BLOCK, number) for number in (2, 0, 3)]
    answers = await asked(world, wants[0], WantHoldings(model, (BLOCK, FILES)), *wants[1:])
    assert answers == [
        Chunk(BLOCK, 2, MODEL.read(BLOCK, 2)),
        Holdings(b"\x0f\x01"),
        Chunk(BLOCK, 0, MODEL.read(BLOCK, 0)),
        Chunk(BLOCK, 3, MODEL.read(BLOCK, 3)),
    ]


@pytest.mark.parametrize(
    ("want", "code"),
    [
        (WantChunk("f" * 64, BLOCK, 0), ErrorCode.WRONG_MODEL),
        (WantChunk(MANIFEST.fingerprint, 99, 0), ErrorCode.BAD_REQUEST),
        (WantChunk(MANIFEST.fingerprint, BLOCK, 4), ErrorCode.BAD_REQUEST),
        (WantHoldings(MANIFEST.fingerprint, (BLOCK, 99)), ErrorCode.BAD_REQUEST),
        (WantManifest("", 0), ErrorCode.WRONG_MODEL),
        (Probe(1), ErrorCode.PROTOCOL),
    ],
)
async def test_what_cannot_be_given_is_refused(world: World, want: Frame, code: ErrorCode) -> None:
    (answer,) = await asked(world, want)
    assert isinstance(answer, Failed)
    assert answer.code is code


async def test_what_cannot_be_read_is_lacking(world: World) -> None:
    class Broken(Some):
        def read(self, number: int, chunk: int) -> bytes | None:
            if chunk == 0:
                raise ModelError("the file has changed")
            return None

    model = MANIFEST.fingerprint
    wants = [WantChunk(model, ENDS, 0), WantChunk(model, BLOCK, 1)]
    answers = await asked(world, *wants, holder=Broken(b""))
    assert answers == [NoChunk(ENDS, 0), NoChunk(BLOCK, 1)]


async def test_where_little_may_be_uploaded_few_are_given_to_at_a_time(world: World) -> None:
    handler = ShardServer(MODEL, Uploads(100_000.0, lambda: 0.0), HELLO).handle
    async with world.peer(handler) as peer_id:
        address = world.peers[-1].multiaddrs
        answers = []
        for _ in range(2):
            frames = await open_frame_stream(world.network, peer_id, address, SHARD_PROTOCOL, HELLO)
            await frames.send(WantHoldings(MANIFEST.fingerprint, (BLOCK,)))
            answers.append(await frames.receive())
        assert [type(answer) for answer in answers] == [Holdings, Refused]


async def test_streams_are_bounded(world: World) -> None:
    async with world.peer(giver()) as peer_id:
        streams = []
        for _ in range(shard_server.PEER_STREAMS + 1):
            frames = await open_frame_stream(
                world.network, peer_id, world.peers[-1].multiaddrs, SHARD_PROTOCOL, HELLO
            )
            await frames.send(WantManifest(MANIFEST.fingerprint, 0))
            answer = await frames.receive()
            streams.append(frames)
        assert isinstance(answer, Refused)
        assert answer.retry_after is not None
        for frames in streams:
            await frames.close()


# --- the pace ---------------------------------------------------------------------------------------


async def test_uploads_are_as_fast_as_is_allowed(autojump_clock: trio.testing.MockClock) -> None:
    uploads = Uploads(1000.0, lambda: 0.0)
    begin = trio.current_time()
    for _ in range(50):
        await uploads.turn(100)
    assert 4.8 < trio.current_time() - begin < 5.1


async def test_uploads_give_way_while_sessions_compute(
    autojump_clock: trio.testing.MockClock,
) -> None:
    uploads = Uploads(None, trio.current_time)  # busy all the time
    await uploads.turn(1)
    await trio.sleep(1)
    begin = trio.current_time()
    went = []
    for _ in range(200):
        await uploads.turn(1 << 20)
        went.append(trio.current_time() - begin)
    assert went[:4] == [0.0] * 4
    assert len({round(seconds, 6) for seconds in went}) == 50, "four together, and then a pause"
    assert 24 < went[-1] < 25
