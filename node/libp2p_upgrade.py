"""From a raw connection to one that can carry streams: Noise, our Yamux, and nobody who is not allowed."""

from libp2p.abc import IMuxedConn, IRawConnection, ISecureConn
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as new_x25519_key_pair
from libp2p.custom_types import TMuxerOptions, TProtocol, TSecurityOptions
from libp2p.peer.id import ID
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.transport.exceptions import SecurityUpgradeFailure
from libp2p.transport.upgrader import TransportUpgrader

from .libp2p_noise import NoiseMessages
from .libp2p_yamux import PROTOCOL_ID as YAMUX
from .libp2p_yamux import Traffic, YamuxConnection
from .libp2p_yamux_stream import YamuxLimits
from .private import Privacy


def upgrader_of(
    key_pair: KeyPair, privacy: Privacy, limits: YamuxLimits, traffic: Traffic
) -> TransportUpgrader:
    """Noise and Yamux only: the library's default would also accept a dialler in plain text."""
    noise = NoiseTransport(key_pair, noise_privkey=new_x25519_key_pair().private_key)
    upgrader = _AllowedOnly(privacy, {NOISE: noise}, {TProtocol(YAMUX): YamuxConnection})
    upgrader.muxer_multistream = _YamuxOnly(limits, traffic)
    return upgrader


class _AllowedOnly(TransportUpgrader):
    """Hangs up on whoever is not allowed here as soon as it has proved who it is."""

    def __init__(self, privacy: Privacy, security: TSecurityOptions, muxers: TMuxerOptions) -> None:
        super().__init__(security, muxers)
        self._privacy = privacy

    async def upgrade_security(
        self,
        raw_conn: IRawConnection,
        is_initiator: bool,  # noqa: FBT001 - the library's signature
        peer_id: ID | None = None,
    ) -> ISecureConn:
        """Shake hands. Raises SecurityUpgradeFailure."""
        secured = await super().upgrade_security(raw_conn, is_initiator, peer_id)
        if not self._privacy.allows(str(secured.get_remote_peer())):
            await secured.close()
            raise SecurityUpgradeFailure(f"{secured.get_remote_peer()} is not on our list")
        assert isinstance(secured, SecureSession)
        assert isinstance(secured.conn, NoiseTransportReadWriter)
        secured.conn = NoiseMessages(raw_conn, secured.conn)
        return secured


class _YamuxOnly(MuxerMultistream):
    """The library makes its own Yamux whatever class one asks for."""

    def __init__(self, limits: YamuxLimits, traffic: Traffic) -> None:
        super().__init__({TProtocol(YAMUX): YamuxConnection})
        self._limits, self._traffic = limits, traffic

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Negotiate Yamux and make the connection."""
        await self.select_transport(conn)
        return YamuxConnection(conn, peer_id, self._limits, self._traffic)
