"""``/petals/describe/1``: what a node is and carries right now, asked of the node itself."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

import trio

from ..protocol.announcement import Announcement, decode_signed
from ..protocol.checks import MAX_PLAIN_FRAME
from ..protocol.errors import ErrorCode, PeerError, RemoteProtocolError
from ..protocol.expected import EXPECTED_BLOCKS, Expected
from ..protocol.frames import DESCRIBE_PROTOCOL, Describe, Description, Hello
from .frame_stream import FrameStream, failed, open_frame_stream
from .network import Network, Stream

TIMEOUT = 5.0
"""Seconds for the whole exchange; a candidate that takes longer is of no use to a session."""

Ask = Callable[..., Awaitable[tuple[Announcement | None, Mapping[str, float]]]]
"""``Node.describe``: ``ask`` below, by this node."""


async def answer(
    stream: Stream,
    hello: Hello,
    *,
    announcement: Callable[[], bytes | None],
    figures: Callable[[], Mapping[str, float]],
    expected: Expected,
) -> None:
    """Serve one inbound stream of the describe protocol; whoever is about to open is expected."""
    frames = FrameStream(stream, hello, limit=MAX_PLAIN_FRAME)
    with trio.move_on_after(TIMEOUT):
        try:
            asked = await frames.receive()
            if isinstance(asked, Describe):
                now = trio.current_time()
                told = {**figures(), EXPECTED_BLOCKS: expected.blocks(now)}
                if asked.blocks is not None:
                    expected.asked(stream.peer_id, asked.blocks, now)
                await frames.send(Description(announcement() or b"", told))
            else:
                await frames.send(failed(ErrorCode.PROTOCOL, "ask with a describe frame"))
        except (PeerError, RemoteProtocolError):
            return  # whoever asked has gone, or speaks something else


async def ask(
    network: Network,
    peer_id: str,
    multiaddrs: Sequence[str],
    hello: Hello,
    *,
    blocks: int | None = None,
    now: float,
) -> tuple[Announcement | None, Mapping[str, float]]:
    """The announcement (None: it serves nothing) and the figures of a peer. Raises PeerError.

    ``blocks``: how many of them a session would run that is about to be opened there.
    """
    with trio.move_on_after(TIMEOUT):
        frames = await open_frame_stream(
            network, peer_id, tuple(multiaddrs), DESCRIBE_PROTOCOL, hello
        )
        try:
            await frames.send(Describe(blocks))
            answered = await frames.receive()
            if not isinstance(answered, Description):
                raise RemoteProtocolError("it answered with something else")
            if not answered.announcement:
                return None, answered.figures
            announcement = decode_signed(answered.announcement, now)
            if announcement.peer_id != peer_id:
                raise RemoteProtocolError("it answered for somebody else")
            return announcement, answered.figures
        except RemoteProtocolError as error:
            raise PeerError(f"peer {peer_id} cannot be asked: {error}", peer_id=peer_id) from error
        finally:
            await frames.close()
    raise PeerError(
        f"peer {peer_id} did not describe itself within {TIMEOUT:.0f} s",
        code=ErrorCode.TIMEOUT,
        peer_id=peer_id,
    )
