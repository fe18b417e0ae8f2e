"""Frames over a stream: hello first, every wait with a deadline, any number of senders."""

import collections
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import trio

from ..protocol.checks import MAX_FRAME, MAX_REASON
from ..protocol.codec import FrameDecoder, encode
from ..protocol.errors import ErrorCode, PeerError, RemoteProtocolError
from ..protocol.frames import PROTOCOL_VERSION, Failed, Frame, Hello, Refused
from .network import Network, Stream

F = TypeVar("F", bound=Frame)

SEND_TIMEOUT = 60.0
"""Seconds that a frame (at most 4 MiB) may take to be handed over: 70 KB/s at least."""


class FrameStream:
    """One stream of frames to a peer. Each side's first frame is ``hello``; it is added here."""

    def __init__(self, stream: Stream, hello: Hello, *, limit: int = MAX_FRAME) -> None:
        """``limit``: bytes of the largest frame that is waited for."""
        self._stream = stream
        self._hello: Hello | None = hello
        self._greeted = False
        self._decoder = FrameDecoder(limit)
        self._received: collections.deque[Frame] = collections.deque()
        self._failure: Exception | None = None
        self._send_lock = trio.Lock()
        self.cut_off = False
        """Whether it has ended in the middle of a frame: the peer may just have died."""

    @property
    def peer_id(self) -> str:
        """Who is at the other end."""
        return self._stream.peer_id

    def allow(self, limit: int) -> None:
        """Wait for frames of up to so many bytes from now on."""
        self._decoder.limit = limit

    async def send(self, *frames: Frame) -> None:
        """Send the frames in order. Raises PeerError when the stream is broken or stuck."""
        await trio.lowlevel.checkpoint_if_cancelled()
        buffers = [buffer for frame in frames for buffer in encode(frame)]
        if self._sent_now(buffers):
            return
        async with self._send_lock:
            buffers = self._greeting() + buffers
            self._hello = None
            with trio.move_on_after(SEND_TIMEOUT):
                await self._stream.send(buffers)
                return
        raise PeerError(
            f"peer {self.peer_id} did not take a frame for {SEND_TIMEOUT:.0f} s",
            code=ErrorCode.TIMEOUT,
            peer_id=self.peer_id,
        )

    def send_now(self, frame: Frame) -> bool:
        """``send`` without waiting; False: it may have to wait, or fails, and nothing was sent."""
        return self._sent_now(encode(frame))

    def _sent_now(self, buffers: list[bytes | memoryview]) -> bool:
        if self._send_lock.locked() or not self._stream.send_now(self._greeting() + buffers):
            return False
        self._hello = None
        return True

    def _greeting(self) -> list[bytes | memoryview]:
        return [] if self._hello is None else encode(self._hello)

    async def receive(self, at_once: Callable[[Frame], bool] | None = None) -> Frame | None:
        """The next frame, or None when the peer has ended the stream between two frames.

        While it waits, ``at_once`` has the frames behind ``hello``, in the turn of the loop in which
        they come; the first for which it returns False is what is returned.

        Raises RemoteProtocolError for bytes that are no frame, PeerError for a broken stream, and
        what ``at_once`` raises. One caller at a time.
        """
        take = None if at_once is None else partial(self._take, at_once)
        while True:
            while not self._received:
                if take is not None and self._greeted:
                    await self._stream.wait(take)
                    if self._failure is not None:
                        raise self._failure
                    if self._received:
                        break
                data = await self._stream.receive()
                if not data:
                    if self._decoder.mid_frame:
                        self.cut_off = True
                        raise RemoteProtocolError(f"peer {self.peer_id} left in mid-frame")
                    return None
                self._received.extend(self._decoder.feed(data))
            frame = self._received.popleft()
            if self._greeted:
                return frame
            self._greeted = True
            if not isinstance(frame, Hello):
                raise RemoteProtocolError(f"peer {self.peer_id} sent {frame.KIND} before hello")
            if frame.version != PROTOCOL_VERSION:
                raise RemoteProtocolError(
                    f"peer {self.peer_id} (version {frame.node_version}) speaks version "
                    f"{frame.version} of the protocol, this node {PROTOCOL_VERSION}: "
                    "update the older of the two"
                )

    def _take(self, at_once: Callable[[Frame], bool], data: bytes) -> bool:
        """Whether to go on waiting for what comes behind ``data``."""
        try:
            self._received.extend(self._decoder.feed(data))
            while self._received and at_once(self._received[0]):
                self._received.popleft()
        except Exception as error:  # noqa: BLE001 - for the task that waits, not for the connection
            self._failure = error
        return not self._received and self._failure is None

    def come(self, kind: type[F], most: int) -> list[F]:
        """Of the frames that have come already, the next ones of this kind; at most so many."""
        frames: list[F] = []
        while len(frames) < most and self._received:
            frame = self._received[0]
            if not isinstance(frame, kind):
                break
            frames.append(frame)
            self._received.popleft()
        return frames

    async def close(self) -> None:
        """Close both directions. Idempotent, does not raise."""
        await self._stream.close()


async def open_frame_stream(
    network: Network, peer_id: str, multiaddrs: tuple[str, ...], protocol: str, hello: Hello
) -> FrameStream:
    """Open a stream of frames to a peer. Raises PeerError."""
    return FrameStream(await network.open_stream(peer_id, multiaddrs, protocol), hello)


def refused(code: ErrorCode, reason: str, retry_after: float | None = None) -> Refused:
    """A refusal whose reason fits the wire."""
    return Refused(code, reason[:MAX_REASON], retry_after)


def failed(code: ErrorCode, reason: str, peer_id: str | None = None) -> Failed:
    """A failure whose reason fits the wire."""
    return Failed(code, reason[:MAX_REASON], peer_id)
