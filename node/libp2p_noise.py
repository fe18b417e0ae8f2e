"""Noise messages over a raw connection: several of them for one call of the kernel.

The handshake is py-libp2p's; afterwards this takes the place of what the library puts between a
connection and its cipher. There, each message costs two reads, four copies and a system call, which
together take more time than encrypting it.

Rules of this file: one task reads and one writes; a message that was tampered with ends the connection;
what is kept of the peer's bytes is what one call of the kernel has brought.
"""

import os

from cryptography.exceptions import InvalidTag
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.io.abc import EncryptedMsgReadWriter
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.secure_session import SecureSession

from .libp2p_sockets import BufferedSocket

_LENGTH_BYTES = 2
_TAG_BYTES = 16
MESSAGE_BYTES = 65535 - _TAG_BYTES
"""The plaintext of the largest message."""


class NoiseMessages(EncryptedMsgReadWriter):
    """What ``SecureSession`` reads and writes, once two peers have shaken hands."""

    def __init__(self, conn: IRawConnection, theirs: NoiseTransportReadWriter) -> None:
        """``theirs``: what the library has put there, whose keys and counters go on here."""
        super().__init__(conn)
        self._raw = conn
        self._sealing = theirs.noise_state.noise_protocol.cipher_state_encrypt
        self._opening = theirs.noise_state.noise_protocol.cipher_state_decrypt
        self._arrived = memoryview(b"")
        """What the last call of the kernel brought, and was not read yet."""
        below = conn.stream if type(conn) is RawConnection else None
        self._socket = below if isinstance(below, BufferedSocket) and os.name == "posix" else None
        self._receive = conn.read if self._socket is None else self._socket.read
        self._unsent = b""

    async def read_msg(self) -> bytes:
        """The next message; b"" when the peer has ended the connection between two."""
        length = await self._take(_LENGTH_BYTES)
        if not length:
            return b""
        sealed = await self._take(int.from_bytes(length, "big"))
        if not sealed:
            raise ConnectionClosedError("the peer left in the middle of a message")
        return self.decrypt(sealed)

    async def write_msg(self, msg: bytes) -> None:
        """Send ``msg``, of any length, as one message or several."""
        view = memoryview(msg)
        pieces, self._unsent = [self._unsent], b""
        for start in range(0, len(view), MESSAGE_BYTES):
            sealed = self.encrypt(view[start : start + MESSAGE_BYTES])
            pieces += (len(sealed).to_bytes(_LENGTH_BYTES, "big"), sealed)
        await self._raw.write(b"".join(pieces))

    @property
    def can_write_now(self) -> bool:
        """Whether there is a ``write_now``: right over a socket."""
        return self._socket is not None

    def write_now(self, msg: bytes) -> bool:
        """Send ``msg`` of at most ``MESSAGE_BYTES`` without waiting; whether all of it has left.

        If not, the rest leaves with the next ``write_msg``, which has to come next. Raises
        ConnectionClosedError.
        """
        assert self._socket is not None and not self._unsent
        sealed = self.encrypt(msg)
        sealed = len(sealed).to_bytes(_LENGTH_BYTES, "big") + sealed
        self._unsent = sealed[self._socket.write_now(sealed) :]
        return not self._unsent

    def encrypt(self, data: bytes | memoryview) -> bytes:
        """The next message to be sent."""
        sealed: bytes = self._sealing.encrypt_with_ad(None, data)
        return sealed

    def decrypt(self, data: bytes | memoryview) -> bytes:
        """The next message that came."""
        try:
            opened: bytes = self._opening.decrypt_with_ad(None, data)
        except InvalidTag:
            raise ConnectionClosedError("a message was forged, or has changed on its way") from None
        return opened

    async def close(self) -> None:
        """Close the connection below."""
        await self._raw.close()

    async def _take(self, size: int) -> bytes | memoryview:
        """The next ``size`` bytes; none if the peer has ended the connection before they came."""
        taken, self._arrived = self._arrived[:size], self._arrived[size:]
        if len(taken) == size:
            return taken
        pieces, missing = [taken], size - len(taken)
        while missing:
            self._arrived = memoryview(await self._receive())
            if not self._arrived:
                return b""
            pieces.append(self._arrived[:missing])
            self._arrived = self._arrived[missing:]
            missing -= len(pieces[-1])
        return b"".join(pieces)


def noise_messages_of(conn: ISecureConn) -> NoiseMessages | None:
    """What a connection of ours reads and writes."""
    messages = conn.conn if isinstance(conn, SecureSession) else None
    return messages if isinstance(messages, NoiseMessages) else None
