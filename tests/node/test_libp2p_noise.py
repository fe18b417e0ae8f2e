"""Noise messages: several for one call of the kernel, whatever the pieces, and none that was changed."""

import random  # noqa: TID251 - tests throw dice with known seeds

import pytest
import trio
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.noise.io import NoiseTransportReadWriter
from noise.connection import Keypair, NoiseConnection  # type: ignore[import-untyped]
from petals.node.libp2p_noise import MESSAGE_BYTES, NoiseMessages
from petals.node.libp2p_sockets import BufferedSocket


class Wire(RawConnection):
    """What was written, to be read in pieces of any size."""

    def __init__(self) -> None:
        super().__init__(BufferedSocket.__new__(BufferedSocket), initiator=True)
        self.written: list[bytes] = []
        self.pieces: list[bytes] = []

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.written.append(data)

    async def read(self, n: int | None = None) -> bytes:
        assert n is None, "nothing is gained by asking for so many"
        await trio.lowlevel.checkpoint()
        return self.pieces.pop(0) if self.pieces else b""

    def arrive(self, data: bytes, sizes: list[int]) -> None:
        for size in sizes:
            self.pieces.append(data[:size])
            data = data[size:]
        if data:
            self.pieces.append(data)


def shaken_hands() -> tuple[NoiseConnection, NoiseConnection]:
    both = []
    for begin in (NoiseConnection.set_as_initiator, NoiseConnection.set_as_responder):
        state = NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256")
        begin(state)
        state.set_keypair_from_private_bytes(Keypair.STATIC, random.Random(1).randbytes(32))
        state.start_handshake()
        both.append(state)
    ours, theirs = both
    theirs.read_message(bytes(ours.write_message()))
    ours.read_message(bytes(theirs.write_message()))
    theirs.read_message(bytes(ours.write_message()))
    return ours, theirs


def messages(wire: Wire, state: NoiseConnection) -> NoiseMessages:
    return NoiseMessages(wire, NoiseTransportReadWriter(wire, state))


def ends() -> tuple[NoiseMessages, Wire, NoiseMessages, Wire]:
    ours, theirs = shaken_hands()
    sent, received = Wire(), Wire()
    return messages(sent, ours), sent, messages(received, theirs), received


async def test_a_long_message_is_written_at_once_and_read_however_it_is_cut() -> None:
    dice = random.Random(7)
    for _ in range(20):
        here, sent, there, received = ends()
        message = dice.randbytes(dice.choice([1, MESSAGE_BYTES, MESSAGE_BYTES + 1, 300_000]))
        await here.write_msg(message)
        await here.write_msg(b"the end")
        assert len(sent.written) == 2
        sizes = [dice.choice([1, 2, 3, 60_000, 140_000]) for _ in range(10)]
        received.arrive(b"".join(sent.written), sizes)
        got = b""
        while piece := await there.read_msg():
            assert len(piece) <= MESSAGE_BYTES
            got += piece
        assert got == message + b"the end"


async def test_the_library_can_read_it_and_be_read() -> None:
    ours, theirs = shaken_hands()
    wire = Wire()
    end = messages(wire, ours)
    await end.write_msg(b"hello")
    assert theirs.decrypt(wire.written[0][2:]) == b"hello"
    sealed = theirs.encrypt(b"hello yourself")
    wire.arrive(len(sealed).to_bytes(2, "big") + sealed, [])
    assert await end.read_msg() == b"hello yourself"


@pytest.mark.parametrize("place", [2, 10, -1])
async def test_a_message_that_was_changed_ends_the_connection(place: int) -> None:
    here, sent, there, received = ends()
    await here.write_msg(b"the very words")
    changed = bytearray(sent.written[0])
    changed[place] ^= 1
    received.arrive(bytes(changed), [])
    with pytest.raises(ConnectionClosedError, match="forged"):
        await there.read_msg()


@pytest.mark.parametrize("size", [0, 15])
async def test_a_message_too_short_to_be_one_ends_the_connection(size: int) -> None:
    _, _, there, received = ends()
    received.arrive(size.to_bytes(2, "big") + bytes(size), [])
    with pytest.raises(ConnectionClosedError):
        await there.read_msg()


async def test_an_end_in_the_middle_of_a_message_is_no_orderly_one() -> None:
    here, sent, there, received = ends()
    await here.write_msg(b"the very words")
    received.arrive(sent.written[0][:-1], [])
    with pytest.raises(ConnectionClosedError, match="middle"):
        await there.read_msg()
    assert here.get_connection_type() is ConnectionType.DIRECT


async def test_what_the_kernel_does_not_take_at_once_comes_first_with_the_next() -> None:
    ours, theirs = shaken_hands()
    here, there = trio.socket.socketpair()
    for one in (here, there):
        one.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, 4096)
    ends = [
        RawConnection(BufferedSocket(trio.SocketStream(one)), initiator=True)
        for one in (here, there)
    ]
    sending, receiving = (
        NoiseMessages(raw, NoiseTransportReadWriter(raw, state))
        for raw, state in zip(ends, (ours, theirs), strict=True)
    )
    assert sending.can_write_now
    sent = [random.Random(1).randbytes(3000)]
    while sending.write_now(sent[-1]):
        sent.append(random.Random(len(sent)).randbytes(3000))
    sent.append(b"the next")
    received: list[bytes] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sending.write_msg, sent[-1])
        while len(received) < len(sent):
            received.append(await receiving.read_msg())
    assert received == sent
    await receiving.close()
    with pytest.raises(ConnectionClosedError):
        sending.write_now(b"nobody is there")
    await sending.close()
    with pytest.raises(ConnectionClosedError):
        sending.write_now(b"neither are we")
