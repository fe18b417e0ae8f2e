"""Connections of a private swarm: all bytes encrypted with the key that its nodes share.

libp2p's pre-shared keys, as py-libp2p has them (Salsa20 below everything else). Nothing in them
says that the other side has another key: both would wait for something that makes sense. But both
always send the same first words, so whoever does not is found out with the first bytes.
"""

from Crypto.Cipher import Salsa20
from libp2p.connection_types import ConnectionType
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.pnet.psk_conn import PskConn
from multiaddr import Multiaddr

_NONCE_BYTES = 8
_FIRST_WORDS = b"\x13/multistream/1.0.0\n"


class WrongSwarmKey(Exception):
    """The peer has another swarm key, or none."""


class KeyedConnection(PskConn):
    """The library's, which forgets what it wraps, and never notices a wrong key."""

    def __init__(self, below: RawConnection, key: bytes) -> None:
        super().__init__(below, key.hex())
        self.stream = below.stream
        self.is_initiator = below.is_initiator
        self._below = below
        self._ahead: bytes | None = None

    async def read(self, n: int | None = None) -> bytes:
        """Exactly ``n`` bytes unless the stream ends; any number with None."""
        if self._ahead is None:
            self._ahead = await self._read_first_words()
        if not self._ahead:
            return await super().read(n)
        size = len(self._ahead) if n is None else min(n, len(self._ahead))
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        missing = 0 if n is None else n - size
        return data + await super().read(missing) if missing else data

    async def _read_first_words(self) -> bytes:
        # of somebody without a key no more may come than this
        start = await self._below.read(len(_FIRST_WORDS))
        if start == _FIRST_WORDS:
            raise WrongSwarmKey("it has no swarm key")
        if len(start) < len(_FIRST_WORDS):
            return b""
        start += await self._below.read(_NONCE_BYTES)
        words = self._decrypt(start)
        if words != _FIRST_WORDS:
            raise WrongSwarmKey("wrong swarm key?")
        return words

    def _decrypt(self, start: bytes) -> bytes:
        self.read_cipher = Salsa20.new(key=self._psk, nonce=start[:_NONCE_BYTES])
        return self.read_cipher.decrypt(start[_NONCE_BYTES:])

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The peer's addresses."""
        return self._below.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Direct or relayed."""
        return self._below.get_connection_type()
