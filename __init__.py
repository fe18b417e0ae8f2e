"""petals-node: run a language model on a swarm of machines, none of which could hold it alone.

The names below load on first use, so that ``import petals.protocol`` or the command line's
``--help`` does not cost an import of torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .node.blocking import Client, GenerationHandle, connect
    from .node.config import NodeConfig
    from .node.hf.config import AutoDistributedConfig
    from .node.hf.model import AutoDistributedModel, AutoDistributedModelForCausalLM
    from .node.hf.sequential import RemoteSequential
    from .node.hf.session import InferenceSession
    from .node.node import Node
    from .protocol.errors import (
        ModelError,
        ModelMismatch,
        NoRoute,
        PeerError,
        PetalsError,
        ProtocolError,
    )

try:
    __version__ = version("petals-node")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

_HOME = {
    "AutoDistributedConfig": ".node.hf.config",
    "AutoDistributedModel": ".node.hf.model",
    "AutoDistributedModelForCausalLM": ".node.hf.model",
    "Client": ".node.blocking",
    "GenerationHandle": ".node.blocking",
    "InferenceSession": ".node.hf.session",
    "RemoteSequential": ".node.hf.sequential",
    "connect": ".node.blocking",
    "NodeConfig": ".node.config",
    "Node": ".node.node",
    "ModelError": ".protocol.errors",
    "ModelMismatch": ".protocol.errors",
    "NoRoute": ".protocol.errors",
    "PeerError": ".protocol.errors",
    "PetalsError": ".protocol.errors",
    "ProtocolError": ".protocol.errors",
}

__all__ = [
    "AutoDistributedConfig",
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "Client",
    "GenerationHandle",
    "InferenceSession",
    "ModelError",
    "ModelMismatch",
    "NoRoute",
    "Node",
    "NodeConfig",
    "PeerError",
    "PetalsError",
    "ProtocolError",
    "RemoteSequential",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
