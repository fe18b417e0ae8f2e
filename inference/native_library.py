"""Our own code in C, compiled for the processor at hand.

It is compiled when it is first needed (some seconds) and kept in the user's cache, by what it was
made from and for.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
import psutil

_SOURCES = [
    Path(__file__).parent / f"native_{part}.c"
    for part in ("product", "attention", "packing", "rounding", "screening", "wire")
]
_HEADER = Path(__file__).parent / "native_vectors.h"
_COMPILE = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=c11")
_COMPILE_SECONDS = 120.0


class NativeError(RuntimeError):
    """It cannot be had here; the text says why."""


def open_library() -> ctypes.CDLL:
    """The compiled code. Raises NativeError or OSError where it cannot be had."""
    return ctypes.CDLL(str(_library()))


def _library() -> Path:
    """The compiled file, made if it is not there. Raises NativeError or OSError."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise NativeError(f"our kernels are not written for {platform.machine()}")
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        raise NativeError(f"there is no C compiler ({compiler[0]})")
    openmp = _openmp()
    made_from = [
        *[path.read_bytes() for path in (_HEADER, *_SOURCES)],
        " ".join([*compiler, *_COMPILE, openmp]).encode(),
        _run([*compiler, "--version"]),
        _processor(),
    ]
    name = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:32]
    folder = platformdirs.user_cache_path("petals-node") / "native"
    library = folder / f"{name}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as making:
            made = Path(making) / library.name
            objects = [str(Path(making) / f"{source.stem}.o") for source in _SOURCES]
            commands = [
                [*compiler, *_COMPILE, "-c", str(source), "-o", compiled]
                for source, compiled in zip(_SOURCES, objects, strict=True)
            ]
            with ThreadPoolExecutor() as pool:
                list(pool.map(_run, commands))
            # without -fopenmp, which would link a second OpenMP, with threads of its own
            _run([*compiler, "-shared", *objects, openmp, "-lm", "-o", str(made)])
            made.replace(library)
    return library


def _openmp() -> str:
    """The OpenMP library that torch has loaded."""
    for loaded in psutil.Process().memory_maps():
        if Path(loaded.path).name.startswith("libgomp"):
            return str(loaded.path)
    raise NativeError("torch computes without GNU's OpenMP here")


def _processor() -> bytes:
    """What ``-march=native`` depends on."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return b"\n".join(
        next((line for line in lines if line.startswith(field)), b"")
        for field in (b"flags", b"model name")
    )


def _run(command: Sequence[str]) -> bytes:
    try:
        return subprocess.run(  # noqa: S603 - the user's own compiler
            command, check=True, capture_output=True, timeout=_COMPILE_SECONDS
        ).stdout
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        raise NativeError(f"{shlex.join(command[:1])}: {said[0] if said else error}") from error
    except subprocess.TimeoutExpired as error:
        raise NativeError(str(error)) from error
