"""The beginning of a stream: agreeing on a protocol, and messages behind their length.

Rules of this file: whatever the peer says is bounded before it is read, and whatever is wrong with
it becomes ``MuxedStreamError``; the stream is reset then.
"""

from typing import TypeVar

import trio
from google.protobuf.message import DecodeError, Message
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.utils import encode_delim, encode_varint_prefixed

from .libp2p_swarm import DialError
from .libp2p_yamux_stream import YamuxStream

MESSAGE_BYTES = 4096
"""The longest message that is read, if nothing else is said; real ones of most protocols are below 1 KB."""
MESSAGE_SECONDS = 5.0
"""How long one is waited for, likewise."""
_MULTISTREAM = "/multistream/1.0.0"

M = TypeVar("M", bound=Message)


async def negotiate(connection: SwarmConn, protocol: TProtocol) -> YamuxStream:
    """Open a stream and agree on the protocol, in one round trip where the library takes two."""
    stream = await connection.muxed_conn.open_stream()
    assert isinstance(stream, YamuxStream)
    agreed = False
    try:
        communicator = MultiselectCommunicator(stream)
        await stream.write(encode_delim(_MULTISTREAM.encode()) + encode_delim(protocol.encode()))
        answers = (await communicator.read(), await communicator.read())
        agreed = answers == (_MULTISTREAM, protocol)
    except (IOException, MultiselectCommunicatorError, ValueError) as error:
        raise MuxedStreamError(f"it answers nonsense ({error})") from error
    finally:
        if not agreed:
            stream.reset_now("no protocol was agreed on")
    if not agreed:
        raise DialError(f"it does not speak {protocol}")
    stream.protocol = str(protocol)
    return stream


async def send_message(stream: YamuxStream, message: Message) -> None:
    """Send a protobuf behind its length."""
    await stream.write(encode_varint_prefixed(message.SerializeToString()))


async def receive_message(
    stream: YamuxStream,
    kind: type[M],
    *,
    limit: int = MESSAGE_BYTES,
    seconds: float = MESSAGE_SECONDS,
) -> M:
    """The next protobuf. Raises MuxedStreamError if it is none, too long, or late."""
    message = kind()
    try:
        with trio.fail_after(seconds):
            message.ParseFromString(await _receive_prefixed(stream, limit))
    except DecodeError as error:
        raise MuxedStreamError(f"it sends nonsense ({error})") from error
    except trio.TooSlowError as error:
        raise MuxedStreamError(f"no answer within {seconds:g} s") from error
    return message


async def _receive_prefixed(stream: YamuxStream, limit: int) -> bytes:
    length, shift = 0, 0
    while True:
        byte = (await stream.read(1))[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift > 28:
            raise MuxedStreamError("a message length of more than four bytes")
    if length > limit:
        raise MuxedStreamError(f"a message of {length} bytes")
    pieces = []
    while length:
        piece = await stream.read(length)
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)
