"""Is this machine fit for a node? What ``petals-node doctor`` finds without asking anybody.

Rules of this file: each function looks at one thing, changes nothing that lasts, and never raises for
what it has come to find. Only those that need torch import it.
"""

import contextlib
import errno
import importlib.metadata
import platform
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from ...protocol.errors import ConfigError
from ..config import NodeConfig
from .arguments import check_data_dir
from .findings import Finding, bad, good, note
from .running import running_process

PACKAGE = "petals-node"
STATE_BYTES = 64 * 2**20
"""What a data directory may come to: keys, measurements, saved sessions."""
TORCH_ADVICE = "install the build of torch that https://pytorch.org/get-started names for it"


def versions() -> Finding:
    """Python's and ours, and whether every package is one that we were made for."""
    try:
        own, required = importlib.metadata.version(PACKAGE), importlib.metadata.requires(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return note("versions", "petals-node is not installed; its packages cannot be checked")
    wrong, shown = [], []
    for requirement in map(Requirement, required or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.name in ("torch", "transformers", "libp2p"):
            shown.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, where {requirement.specifier} is asked")
    if wrong:
        return bad("versions", "; ".join(wrong), f"pip install --upgrade {PACKAGE}")
    python = f"Python {platform.python_version()}, {PACKAGE} {own}, {', '.join(shown)}"
    return good("versions", f"{python}; all packages are as they should be")


def torch_build(wanted: str) -> Finding:
    """Whether torch runs here, and is made for the device that is wanted."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a library of it that is missing is an OSError
        return bad("torch", f"it cannot be imported: {error}", f"for this machine, {TORCH_ADVICE}")
    from ...inference.device import resolve_device

    version: str = torch.__version__
    try:
        device = resolve_device(wanted)
    except ConfigError as error:
        return bad("torch", f"{version}: {error}", _gpu_trouble() or "set --device to auto or cpu")
    if device.type == "cuda":
        return good("torch", f"{version}, computing on {torch.cuda.get_device_name(device)}")
    trouble = _gpu_trouble() if wanted == "auto" else None
    if trouble is not None:
        return note("torch", f"{version}, computing on the CPU, though a GPU is there", trouble)
    capability = torch.backends.cpu.get_cpu_capability()
    return good("torch", f"{version}, computing on the CPU ({capability})")


def _gpu_trouble() -> str | None:
    """What keeps torch from NVIDIA's GPU, if there is one."""
    import torch

    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if not driver or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"this torch was built without CUDA: {TORCH_ADVICE}"
    return f"the driver is older than CUDA {torch.version.cuda}, or has no device: update it"


def kernels() -> Finding:
    """Whether our own kernels can be compiled for this processor."""
    from ...inference.native import open_native
    from ...inference.native_library import NativeError

    try:
        open_native()
    except (NativeError, OSError) as error:
        advice = "apt install gcc (or name another compiler in $CC)"
        slower = "a node is slower without them, and computes the same"
        return note("kernels", f"cannot be compiled: {error}; {slower}", advice)
    return good("kernels", "compiled for this processor")


def memory(config: NodeConfig) -> Finding:
    """What is there to hold blocks."""
    from ...inference.cores import usable_cores
    from ...inference.device import free_memory, resolve_device

    device = resolve_device(config.device)
    free = free_memory(device)
    says = f"{gigabytes(free)} free on {device}; {len(usable_cores())} cores"
    if free < 2**30:
        return note("memory", says, "end other programs; a node without a model needs some 300 MB")
    return good("memory", says)


def data_directory(config: NodeConfig) -> Iterator[Finding]:
    """Whether the node's state can be kept, and whether there is a node already."""
    folder = config.data_dir
    try:
        check_data_dir(folder)
        running = running_process(folder)
    except ConfigError as error:
        yield bad("data directory", str(error))
        return
    if running is not None:
        yield note(
            "data directory",
            f"the node of {folder} runs already, as process {running}",
            "another one needs a --data-dir of its own; `petals-node drain` ends that one",
        )
    yield space("data directory", folder, STATE_BYTES, "--data-dir")


def space(subject: str, folder: Path, needed: int, setting: str) -> Finding:
    """Whether ``needed`` bytes fit into ``folder``, which ``setting`` would move."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        return bad(
            subject,
            f"no space: {gigabytes(free)} free in {folder}, and {gigabytes(needed)} are needed",
            f"free some, or choose another place with {setting}",
        )
    return good(subject, f"{folder}, {gigabytes(free)} free")


def ports(config: NodeConfig) -> Iterator[Finding]:
    """Whether the node can listen where it is to."""
    for multiaddr in config.listen:
        _, kind, host, _, port = multiaddr.split("/")
        if port == "0":
            yield good("port", f"{multiaddr}: any that is free")
            continue
        family = socket.AF_INET6 if ":" in host or kind == "ip6" else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, int(port)))
                listener.listen()
            except OSError as error:
                yield _port_trouble(config, multiaddr, int(port), error)
            else:
                yield good("port", f"{multiaddr} is free")


def _port_trouble(config: NodeConfig, multiaddr: str, port: int, error: OSError) -> Finding:
    if error.errno == errno.EADDRINUSE:
        holder = _listening_at(port)
        with contextlib.suppress(ConfigError):
            if holder is not None and holder.pid == running_process(config.data_dir):
                return good("port", f"{multiaddr} is that of the node that runs already")
        name = "another program" if holder is None else f"{holder.name()} (process {holder.pid})"
        return bad(
            "port",
            f"{multiaddr} is in use, by {name}",
            "end that, or choose another port with --listen (0 is any that is free)",
        )
    advice = {
        errno.EACCES: "ports below 1024 are the administrator's: choose a higher one",
        errno.EADDRNOTAVAIL: "this machine has no such address: 0.0.0.0 is all that it has",
    }
    says = f"{multiaddr} cannot be listened at: {error.strerror}"
    return bad("port", says, advice.get(error.errno or 0, "choose another with --listen"))


def _listening_at(port: int) -> psutil.Process | None:
    """Who that is, where we may know it."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr
                and connection.laddr.port == port
                and connection.pid is not None
            ):
                return psutil.Process(connection.pid)
    return None


def gigabytes(count: float) -> str:
    """Bytes for people."""
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / size:.3g} {unit}"
