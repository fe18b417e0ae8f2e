"""What one session sends on one stream: in the turn of the event loop in which it becomes due, if it can.

Every hop's turns are part of every token. Only what has to wait, for room in the stream or for rows that
are still computed, is left to a task.
"""

import collections
from collections.abc import Awaitable, Callable

from ..protocol.frames import Frame
from .frame_stream import FrameStream
from .wakeup import Signal

LateFrame = Callable[[], Awaitable[Frame]]
NextFrame = Callable[[], Frame | LateFrame | None]
"""What is due next, or what computes it, which is then taken; None: nothing."""


class Outbox:
    """Used by one ``run`` at a time; what is due while none runs waits for the next."""

    def __init__(self) -> None:
        self._signal = Signal()
        self._send_now = _nothing_sent

    def notify(self) -> None:
        """There may be something due."""
        if not self._send_now():
            self._signal.notify()

    async def run(self, stream: FrameStream, next_frame: NextFrame) -> None:
        """Send what is due on ``stream`` until cancelled; what was taken and not sent is lost then.

        Raises PeerError when the stream is broken or stuck, and what computing a frame raises.
        """
        taken = collections.deque[Frame | LateFrame]()  # one at most, ahead of what is due

        def send_now() -> bool:
            """Whether nothing is left."""
            while not taken:
                frame = next_frame()
                if frame is None:
                    return True
                if not (isinstance(frame, Frame) and stream.send_now(frame)):
                    taken.append(frame)
            return False

        try:
            while True:
                if send_now():
                    self._send_now = send_now
                    await self._signal.wait()
                else:
                    frame = taken[0]
                    await stream.send(frame if isinstance(frame, Frame) else await frame())
                    taken.popleft()
        finally:
            self._send_now = _nothing_sent


def _nothing_sent() -> bool:
    return False
