"""Which device to compute on, from what the user wrote, and how much memory it has left.

``auto`` is CUDA where there is some.
"""

from pathlib import Path

import psutil
import torch

from ..protocol.errors import ConfigError

_CGROUP = Path("/sys/fs/cgroup")


def resolve_device(device: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that exists here.

    Raises ConfigError for anything else, and for a CUDA device that this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device == "cpu":
        return torch.device("cpu")
    kind, _, number = device.partition(":")
    if kind != "cuda" or (":" in device and not (number.isascii() and number.isdigit())):
        raise ConfigError(
            f"device: {device!r} is not a device; use auto, cpu, cuda or cuda:N (such as cuda:0)"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device: {device!r} was asked for, but torch sees no CUDA device on this machine; "
            "use cpu, or install a torch build with CUDA and its driver"
        )
    index = int(number or "0")
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device: there is no {device!r}; this machine has cuda:0 to "
            f"cuda:{torch.cuda.device_count() - 1}"
        )
    return torch.device("cuda", index)


def as_device(device: torch.device | str) -> torch.device:
    """A device as torch's, or resolved from the user's words."""
    return resolve_device(device) if isinstance(device, str) else device


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``; on a CPU, within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        cached = _inactive_file_bytes((_CGROUP / "memory.stat").read_text())
    except (OSError, ValueError):  # no container, or no limit ("max")
        return available
    return max(0, min(available, limit - used + cached))


def _inactive_file_bytes(stat: str) -> int:
    """Page cache that the kernel gives up before it refuses memory, from ``memory.stat``."""
    fields = dict(line.split() for line in stat.splitlines())
    return int(fields.get("inactive_file", 0))
