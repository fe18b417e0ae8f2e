"""What is due leaves in the turn in which it becomes due; the rest in its order, by a task."""

import collections
from collections.abc import Callable, Sequence

import pytest
import trio
import trio.testing
from petals.node.frame_stream import FrameStream
from petals.node.outbox import LateFrame, Outbox
from petals.protocol.codec import FrameDecoder
from petals.protocol.errors import ErrorCode, PeerError
from petals.protocol.frames import PROTOCOL_VERSION, Frame, Hello, Probe


class Pipe:
    """A ``Stream`` with room for so many messages."""

    peer_id = "12D3peer"

    def __init__(self, room: int) -> None:
        self.room = room
        self.more = trio.Event()
        self.broken = False
        self._decoder = FrameDecoder()
        self.nonces: list[int] = []

    def send_now(self, buffers: Sequence[bytes | memoryview]) -> bool:
        if self.room == 0 or self.broken:
            return False
        self.room -= 1
        frames = self._decoder.feed(b"".join(buffers))
        self.nonces += [frame.nonce for frame in frames if isinstance(frame, Probe)]
        return True

    async def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        while not self.send_now(buffers):
            if self.broken:
                raise PeerError("broken", code=ErrorCode.UNREACHABLE)
            self.more = trio.Event()
            await self.more.wait()

    async def receive(self) -> bytes:
        raise NotImplementedError

    async def wait(self, take: Callable[[bytes], bool]) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        pass

    def grow(self, room: int) -> None:
        self.room += room
        self.more.set()


class Due:
    """Frames that become due."""

    def __init__(self) -> None:
        self.frames: collections.deque[Frame | LateFrame] = collections.deque()
        self.outbox = Outbox()

    def add(self, *frames: Frame | LateFrame) -> None:
        self.frames.extend(frames)
        self.outbox.notify()

    async def run(self, pipe: Pipe) -> None:
        stream = FrameStream(pipe, Hello(PROTOCOL_VERSION, "test"))
        await self.outbox.run(stream, lambda: self.frames.popleft() if self.frames else None)


async def test_what_fits_leaves_at_once_and_the_rest_in_order() -> None:
    pipe, due = Pipe(room=2), Due()
    due.add(Probe(1))  # nobody is there to send it
    async with trio.open_nursery() as nursery:
        nursery.start_soon(due.run, pipe)
        await trio.testing.wait_all_tasks_blocked()
        assert pipe.nonces == [1]
        with trio.testing.assert_no_checkpoints():
            due.add(Probe(2))
            assert pipe.nonces == [1, 2]
            due.add(Probe(3))
            due.add(Probe(4), Probe(5))
        await trio.testing.wait_all_tasks_blocked()
        pipe.grow(1)
        await trio.testing.wait_all_tasks_blocked()
        assert pipe.nonces == [1, 2, 3]
        due.add(Probe(6))
        pipe.grow(9)
        await trio.testing.wait_all_tasks_blocked()
        assert pipe.nonces == [1, 2, 3, 4, 5, 6]
        due.add(Probe(7))
        assert pipe.nonces[-1] == 7
        nursery.cancel_scope.cancel()


async def test_what_is_computed_later_is_overtaken_by_nothing() -> None:
    pipe, due, computed = Pipe(room=9), Due(), trio.Event()

    async def later() -> Frame:
        await computed.wait()
        return Probe(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(due.run, pipe)
        await trio.testing.wait_all_tasks_blocked()
        due.add(later, Probe(2))
        await trio.testing.wait_all_tasks_blocked()
        due.add(Probe(3))
        assert pipe.nonces == []
        computed.set()
        await trio.testing.wait_all_tasks_blocked()
        assert pipe.nonces == [1, 2, 3]
        nursery.cancel_scope.cancel()


async def test_a_stream_that_breaks_ends_its_run_and_what_is_due_waits_for_the_next() -> None:
    pipe, due = Pipe(room=0), Due()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(due.run, pipe)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    due.add(Probe(1))
    pipe.broken = True
    with pytest.raises(PeerError, match="broken"):
        await due.run(pipe)
    due.add(Probe(2))
    second = Pipe(room=9)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(due.run, second)
        await trio.testing.wait_all_tasks_blocked()
        assert second.nonces == [2], "whoever runs it knows what was lost"
        nursery.cancel_scope.cancel()
