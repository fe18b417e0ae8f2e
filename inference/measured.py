"""What was measured on this machine, in files: whatever it depends on, and reading and writing it.

A file that cannot be read or written costs a measurement only.
"""

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

logger = logging.getLogger(__name__)

_REMEMBERED = 64
"""Measurements in a file; the oldest go first."""


def circumstances(*what: str, device: torch.device) -> str:
    """A key of ``what``: with all that its speed depends on, but for what else the machine does."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()}"
    )
    versions = f"torch {torch.__version__} transformers {transformers.__version__}"
    parts = (*what, device.type, name, torch.get_num_threads(), versions, _source())
    return " | ".join(map(str, parts))


def _source() -> str:
    """What changes when the code that is measured does."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in (
        "attention.py",
        "kernel_choice.py",
        "kernels.py",
        "lanes.py",
        "linear.py",
        "native.py",
        "native_attention.c",
        "native_packing.c",
        "native_product.c",
        "native_rounding.c",
        "native_vectors.h",
        "packed.py",
        "packing.py",
        "throughput.py",
        "twelve_bits.py",
    ):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:12]


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The measurements in a file, by their keys; what they are of is for the caller to check."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
            raise ValueError("not a map of maps")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return {}
    return content


def write(path: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Atomic: another node of this machine may write at the same time, and one of them wins."""
    text = json.dumps(dict(list(known.items())[-_REMEMBERED:]), indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)
