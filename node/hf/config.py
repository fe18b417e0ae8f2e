"""The config of a model in a swarm: transformers' own, and how to reach the swarm."""

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from ...inference.checkpoint import open_config
from ...protocol.errors import ConfigError
from ..config import BOOTSTRAP_VARIABLE, DEFAULT_PATIENCE, NodeConfig, bootstrap_from_environment

SWARM_OPTIONS: dict[str, Any] = {
    "dtype": "auto",
    "wire_dtype": "auto",
    "device": "auto",
    "patience": DEFAULT_PATIENCE,
}
"""What ``from_pretrained`` takes beside ``initial_peers``, as ``petals.connect`` does; defaults."""

FOREIGN_OPTIONS = (
    "active_adapter", "ban_timeout", "connect_timeout", "daemon_startup_timeout", "max_backoff",
    "max_pinged", "max_retries", "min_backoff", "ping_timeout", "request_timeout", "show_route",
    "update_period", "use_server_to_server",
)  # fmt: skip
"""Options of Petals that tune what happens by itself here. They are taken, and change nothing."""


class AutoDistributedConfig:
    """As transformers' ``AutoConfig``, for a model in a swarm."""

    def __init__(self) -> None:
        raise TypeError("use AutoDistributedConfig.from_pretrained(name_or_path, …)")

    @staticmethod
    def from_pretrained(
        name_or_path: str, *, initial_peers: Sequence[str] | None = None, **options: Any
    ) -> PreTrainedConfig:
        """The model's config, with ``initial_peers`` (None: those in ``PETALS_BOOTSTRAP``).

        ``options`` are those of ``petals.connect`` (``torch_dtype`` is ``dtype``), and changes to the
        config. Raises ConfigError, ModelError.
        """
        config = open_config(name_or_path)
        peers = bootstrap_from_environment() if initial_peers is None else initial_peers
        return with_options(config, name_or_path, initial_peers=list(peers), **options)


def with_options(config: PreTrainedConfig, name_or_path: str, **options: Any) -> PreTrainedConfig:
    """Write into ``config`` what ``options`` say. Raises ConfigError."""
    if (dtype := options.pop("torch_dtype", None)) is not None:
        options.setdefault("dtype", dtype)
    config.name_or_path = str(name_or_path)
    config.initial_peers = list(options.pop("initial_peers", getattr(config, "initial_peers", ())))
    swarm = {**SWARM_OPTIONS, **getattr(config, "swarm_options", {})}
    foreign = sorted(options.keys() & set(FOREIGN_OPTIONS))
    if foreign:
        warnings.warn(f"{', '.join(foreign)}: nothing to set here, it is left out", stacklevel=3)
    for name, value in options.items():
        if name in SWARM_OPTIONS:
            swarm[name] = str(value).removeprefix("torch.") if name == "dtype" else value
        elif name not in FOREIGN_OPTIONS:
            if not hasattr(config, name):
                raise ConfigError(
                    f"{name}: neither a field of this model's config nor an option; there are "
                    f"initial_peers, {', '.join(SWARM_OPTIONS)}"
                )
            setattr(config, name, value)
    config.swarm_options = swarm
    return config


def node_config(config: PreTrainedConfig) -> NodeConfig:
    """A node that originates sessions of the model. Raises ConfigError."""
    peers = tuple(getattr(config, "initial_peers", ()))
    if not peers:
        raise ConfigError(
            'no way into a swarm: pass initial_peers=["/ip4/ADDRESS/tcp/PORT/p2p/PEER_ID"], or '
            f"set the environment variable {BOOTSTRAP_VARIABLE}"
        )
    options = {**SWARM_OPTIONS, **getattr(config, "swarm_options", {})}
    return NodeConfig(model=config.name_or_path, serve=False, bootstrap=peers, **options)
