"""Frames as they come: to whoever waits, in the turn of the loop in which they come."""

import pytest
import trio
import trio.testing
from petals.node.frame_stream import FrameStream
from petals.node.loopback import LoopbackStream, loopback_streams
from petals.protocol.codec import encode
from petals.protocol.errors import RemoteProtocolError
from petals.protocol.frames import PROTOCOL_VERSION, Frame, Hello, Probe

HELLO = Hello(PROTOCOL_VERSION, "test")


class Reader:
    """Takes probes at once up to ``most``, and fails at 13."""

    def __init__(self, stream: LoopbackStream, most: int) -> None:
        self._frames = FrameStream(stream, HELLO)
        self._most = most
        self.at_once: list[int] = []
        self.later: list[int] = []

    async def run(self) -> None:
        while (frame := await self._frames.receive(self._take)) is not None:
            assert isinstance(frame, Probe)
            self.later.append(frame.nonce)

    def _take(self, frame: Frame) -> bool:
        assert isinstance(frame, Probe)
        if frame.nonce == 13:
            raise RemoteProtocolError("an unlucky number")
        if frame.nonce > self._most:
            return False
        self.at_once.append(frame.nonce)
        return True


async def test_frames_are_taken_in_the_turn_in_which_they_come() -> None:
    ours, theirs = loopback_streams("12D3peer")
    sender, reader = FrameStream(ours, HELLO), Reader(theirs, most=4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        await sender.send(Probe(1))
        await trio.testing.wait_all_tasks_blocked()
        with trio.testing.assert_no_checkpoints():
            assert sender.send_now(Probe(2))
            assert sender.send_now(Probe(3))
            assert reader.at_once[-2:] == [2, 3]
            assert sender.send_now(Probe(5)), "which is not taken"
            assert sender.send_now(Probe(4)), "which must not overtake it"
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(reader.at_once + reader.later) == [1, 2, 3, 4, 5]
        assert reader.later[-2:] == [5, 4]
        await sender.close()


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [(encode(Probe(13)), "an unlucky number"), ([b"\0\0\0\1x"], "msgpack array")],
    ids=["refused", "no frame"],
)
async def test_what_is_wrong_with_a_frame_is_told_to_who_waits(
    sent: list[bytes | memoryview], complaint: str
) -> None:
    ours, theirs = loopback_streams("12D3peer")
    sender, reader = FrameStream(ours, HELLO), Reader(theirs, most=99)
    with pytest.RaisesGroup(pytest.RaisesExc(RemoteProtocolError, match=complaint)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.run)
            await sender.send(Probe(1))
            await trio.testing.wait_all_tasks_blocked()
            assert ours.send_now(sent)
