"""What a node can be told: one frozen, validated value. Imports neither torch nor libp2p."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from ..protocol.admission import AdmissionLimits
from ..protocol.errors import ConfigError
from ..protocol.manifest import parse_model
from ..protocol.span import Span
from ..protocol.tensor import DType
from .reachability import REACHABILITIES

DATA_DIR_VARIABLE = "PETALS_DATA_DIR"
BOOTSTRAP_VARIABLE = "PETALS_BOOTSTRAP"
SWARM_KEY_VARIABLE = "PETALS_SWARM_KEY"
DTYPES = ("auto", "float32", "bfloat16", "float16")
WIRE_DTYPES = ("auto", *(dtype.value for dtype in DType))
QUANTIZATIONS = ("none", "int8", "nf4")
MAX_PUBLIC_NAME = 64
LEAST_UPLOAD_LIMIT = 0.1
"""MiB a second; with less, a peer takes us for dead before it has a chunk."""
DEFAULT_PATIENCE = 120.0
"""Seconds: a machine restarts, or somebody starts another one, in less."""


def default_data_dir() -> Path:
    """``$PETALS_DATA_DIR``, or the user's data folder for this program."""
    chosen = os.environ.get(DATA_DIR_VARIABLE)
    return Path(chosen) if chosen else Path(platformdirs.user_data_dir("petals-node"))


def bootstrap_from_environment() -> tuple[str, ...]:
    """The multiaddrs in ``$PETALS_BOOTSTRAP``, separated by spaces."""
    return tuple(os.environ.get(BOOTSTRAP_VARIABLE, "").split())


def swarm_key_from_environment() -> Path | None:
    """The file in ``$PETALS_SWARM_KEY``."""
    chosen = os.environ.get(SWARM_KEY_VARIABLE)
    return Path(chosen) if chosen else None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What a node is to do. Raises ConfigError when it contradicts itself."""

    model: str | None = None
    """``demo``, a folder in Hugging Face layout, a hub id, or ``petals:`` and the fingerprint of a
    model that is fetched from peers. None: a bootstrap peer, or a client that only looks at the
    swarm."""
    fallback: str | None = None
    """For a model that is fetched from peers: a folder or a hub id for what none of them has."""
    seed: bool = False
    """Serve no blocks, only give the model's files to others."""
    serve: bool = True
    """Whether others may use this node: it listens, and serves blocks if it has a model. Off, it
    only originates its own sessions."""
    blocks: Span | None = None
    """The blocks to serve. None: ``num_blocks`` of them where the swarm is weakest."""
    num_blocks: int | None = None
    """How many blocks to serve. None: as many as fit the free memory."""
    bootstrap: tuple[str, ...] = field(default_factory=bootstrap_from_environment)
    """Multiaddrs, each ending in ``/p2p/PEER_ID``, of peers to join the swarm through."""
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    """Multiaddrs to listen on; port 0 takes a free one."""
    announce: tuple[str, ...] = ()
    """Multiaddrs that others are told to dial, for a forwarded port or a proxy. Empty: those of
    ``listen``."""
    reachability: str = "auto"
    """Whether others can dial this node: ``public``, ``private`` (it is reached through relays), or
    ``auto`` to find out."""
    upnp: bool = True
    """Whether to ask the router to forward the port (UPnP), if it is to be found out whether others
    can dial this node, they are not told other addresses (``announce``), and ``listen`` is not on
    loopback only."""
    mdns: bool | None = None
    """Whether to look for peers, and be found, on the local network. None: if no bootstrap peer is
    named, and others than this machine can dial the addresses of ``listen``."""
    swarm_key: Path | None = field(default_factory=swarm_key_from_environment)
    """File with the key that all nodes of a private swarm share; None: the swarm is open."""
    allow_peers: Path | None = None
    """File with the peer ids that this node has to do with, one a line; None: with anybody."""
    identity: Path | None = None
    """File with the node's key; made if it is not there. None: ``identity.pem`` in the data dir for
    a serving node, and a key that is kept nowhere for one that only originates."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Where this node keeps what it must not forget."""
    dtype: str = "auto"
    """``float32``, ``bfloat16``, ``float16``; ``auto`` is the fastest that does not round the
    checkpoint's weights: on a CPU float32 (exact) for those in float16 and float32, which costs no
    more than 16 bit for the former; 16 bit for those in bfloat16, and on CUDA."""
    quantization: str = "none"
    """What the blocks' weights are rounded to: ``none``, ``int8``, or ``nf4`` (4 bits)."""
    wire_dtype: str = "auto"
    """What hidden states of our own sessions travel in: ``float32`` (exact), ``bfloat16``,
    ``float16``, or ``int8`` in blocks of 64 with a scale each; ``auto`` is float32 when the ends
    are held in float32, else their 16-bit dtype."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:N``; ``auto`` takes CUDA when there is some."""
    cache_tokens: int | None = None
    """Tokens of KV cache for all sessions together. None: from the free memory."""
    upload_limit: float | None = None
    """MiB of weights a second that others are given at most; None: as fast as it goes."""
    max_disk_space: float | None = None
    """GiB that weights fetched from peers may take in the data dir, of all models together; those not
    used for longest go first. None: what the disk has."""
    throughput: float | None = None
    """Tokens per second through one block that this node counts as, to the swarm; for a machine that
    has other things to do, too. None: what it has measured."""
    limits: AdmissionLimits = field(default_factory=AdmissionLimits)
    """What other peers may have of this node."""
    public_name: str | None = None
    """A name for the status page."""
    patience: float = DEFAULT_PATIENCE
    """Seconds that a session waits while nobody can serve some blocks, before it fails."""

    def __post_init__(self) -> None:
        if self.fetched_model is None and self.fallback is not None:
            raise ConfigError(
                "fallback: only a model that is fetched from peers (petals:…) has one"
            )
        if self.seed and (self.model is None or not self.serve):
            raise ConfigError("seed: of which model? name it with model (--model)")
        if self.seed and (self.blocks or self.num_blocks):
            raise ConfigError("seed: serves no blocks; leave blocks and num_blocks out")
        for amount, least in (("upload_limit", LEAST_UPLOAD_LIMIT), ("max_disk_space", 0.001)):
            value = getattr(self, amount)
            if value is not None and not least <= value < math.inf:
                raise ConfigError(f"{amount}: must be {least:g} or more, got {value}")
        if self.announce and not self.serve:
            raise ConfigError("announce: a node that does not serve cannot be dialled")
        if self.reachability not in REACHABILITIES:
            raise ConfigError(
                f"reachability: {self.reachability!r} is none of {', '.join(REACHABILITIES)}"
            )
        if self.reachability == "private" and self.announce:
            raise ConfigError(
                "announce: a node with reachability private is reached through relays only; "
                "leave one of the two out"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: {self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"quantization: {self.quantization!r} is none of {', '.join(QUANTIZATIONS)}"
            )
        if self.wire_dtype not in WIRE_DTYPES:
            raise ConfigError(
                f"wire_dtype: {self.wire_dtype!r} is none of {', '.join(WIRE_DTYPES)}"
            )
        if self.blocks is not None and self.num_blocks is not None:
            raise ConfigError("give either blocks (which ones) or num_blocks (how many), not both")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ConfigError(f"num_blocks: must be at least 1, got {self.num_blocks}")
        if self.model is None and (self.blocks or self.num_blocks):
            raise ConfigError("blocks: of which model? name it with model (--model)")
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise ConfigError(f"cache_tokens: must be at least 1, got {self.cache_tokens}")
        if self.throughput is not None and not 0 < self.throughput < math.inf:
            raise ConfigError(
                f"throughput: must be tokens per second, above 0, got {self.throughput}"
            )
        if not 0 <= self.patience < math.inf:
            raise ConfigError(
                f"patience: must be a number of seconds, at least 0, got {self.patience}"
            )
        name = self.public_name
        if name is not None and not (0 < len(name) <= MAX_PUBLIC_NAME and name.isprintable()):
            raise ConfigError(
                f"public_name: must be 1 to {MAX_PUBLIC_NAME} printable characters, got {name!r}"
            )

    @property
    def fetched_model(self) -> str | None:
        """The fingerprint of the model, if it is fetched from peers."""
        try:
            return None if self.model is None else parse_model(self.model)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from error

    @property
    def looks_around(self) -> bool:
        """Whether to use mDNS."""
        if self.mdns is not None:
            return self.mdns
        local = ("/ip4/127.", "/ip6/::1/")
        dialled = self.serve and any(not address.startswith(local) for address in self.listen)
        return dialled and not self.bootstrap

    @property
    def identity_file(self) -> Path | None:
        """Where the key lives; None: nowhere."""
        if self.identity is not None or not self.serve:
            return self.identity
        return self.data_dir / "identity.pem"
