"""``scripts/bench llama-cpp``: beside llama.cpp, in one process and over its RPC servers.

Its ``llama-bench`` and ``ggml-rpc-server`` have to be on the PATH; ``cmake -B build -DGGML_RPC=ON``
and ``cmake --build build --target llama-bench ggml-rpc-server`` make them.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial

import trio

from .gguf_file import write_gguf
from .local import AUTO, FLOAT32, INT8, NF4, Local, Mode, mode_label
from .loopback_swarm import loopback_swarm
from .models import ModelSize
from .report import Report
from .settings import Settings, fits_memory
from .swarm import Prompts, write_locally

BENCH, SERVER = "llama-bench", "ggml-rpc-server"
SERVERS = 2
SHARED = f"text by {SERVERS} processes, theirs being RPC servers"
TEXT = "text by one process"
PROMPT = "prompt by one process"
AT_LEAST = 1.0
"""Of its speed over as many servers as we have processes, at equal bits."""
MODES = ((AUTO, 16), (INT8, 8), (NF4, 4))
"""Of models in 16 bits."""
COPIES = 5
"""Of the model in memory: in one process and shared out, ours and theirs, and the file."""
TOKENS = 32
START_SECONDS = 30.0
RUN_SECONDS = 300.0
HOST = "127.0.0.1"
THREADS = str(os.cpu_count() or 1)


def run(settings: Settings, report: Report, parts: Sequence[str] | None) -> None:
    """The smallest models, in every number of bits."""
    if parts:
        raise SystemExit("--part: llama-cpp has none")
    for program in (BENCH, SERVER):
        if shutil.which(program) is None:
            raise SystemExit(
                f"llama-cpp: there is no {program} on the PATH. Build llama.cpp with -DGGML_RPC=ON "
                f"(targets {BENCH} and {SERVER}), and add the folder of its programs to the PATH."
            )
    tried = [(size, FLOAT32, 32) for size in settings.wide]
    tried += [(size, mode, bits) for size in settings.whole for mode, bits in MODES]
    for size, mode, bits in tried:
        held = size.parameters * bits / 8
        if fits_memory(COPIES * held, f"{size.name} in {bits} bit beside llama.cpp", report):
            trio.run(measure, settings, report, size, mode, bits)


async def measure(
    settings: Settings, report: Report, size: ModelSize, mode: Mode, bits: int
) -> None:
    """One process and two, ours and theirs, in turns."""
    folder, tokens = settings.folder(size, report), 4 if settings.quick else TOKENS
    label, length = f"{mode_label(size, folder, mode)}, {bits} bit", settings.lengths[0]
    report.say(f"{label}: starting {SERVERS} processes each")
    options = ("--quantization", mode.quantization)
    taken: dict[str, list[tuple[float, float]]] = {SHARED: [], TEXT: [], PROMPT: []}
    async with loopback_swarm(folder, SERVERS, mode.dtype, options=options) as swarm:
        with (
            Local(folder, mode, ends=True) as local,
            tempfile.TemporaryDirectory(prefix="petals-bench-") as made,
            rpc_servers() as servers,
        ):
            rival = LlamaCpp(pathlib.Path(made, "model.gguf"))
            await trio.to_thread.run_sync(write_gguf, folder, rival.path, bits)
            prompts = Prompts(local.checkpoint.vocab_size)
            session = local.open(length + tokens + 1)
            for turn in range(settings.rounds + 1):
                write = partial(write_locally, session, prompts.new(length), tokens)
                alone = await trio.to_thread.run_sync(write)
                decoded = await trio.to_thread.run_sync(rival.decode, length, tokens)
                prefilled = await trio.to_thread.run_sync(rival.prefill, length)
                together = await swarm.write(prompts.new(length), tokens)
                shared = await trio.to_thread.run_sync(rival.decode, length, tokens, servers)
                if turn:
                    taken[SHARED].append((1 / together.token, shared))
                    taken[TEXT].append((1 / alone.token, decoded))
                    taken[PROMPT].append((length / alone.first_token, prefilled))
            session.close()
    for what, speeds in taken.items():
        ours, theirs = (statistics.median(one) for one in zip(*speeds, strict=True))
        aim = AT_LEAST if what == SHARED else None
        name = f"{label}: {what}, {length} tokens"
        report.ahead(name, ours, "tokens/s", "llama.cpp", theirs, aim)


class LlamaCpp:
    """``llama-bench`` on a GGUF file; speeds in tokens a second."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def prefill(self, length: int) -> float:
        """A prompt of ``length`` tokens."""
        return self._run("-p", str(length), "-n", "0")

    def decode(self, length: int, tokens: int, servers: Sequence[str] = ()) -> float:
        """``tokens`` behind ``length``; at RPC ``servers``, if there are any."""
        at = ["--rpc", ",".join(servers), "-ngl", "999"] if servers else []
        return self._run("-p", "0", "-n", str(tokens), "-d", str(length), *at)

    def _run(self, *asked: str) -> float:
        command = [BENCH, "-m", str(self.path), *asked, "-t", THREADS, "-r", "1", "-o", "json"]
        done = subprocess.run(command, capture_output=True, check=False, timeout=RUN_SECONDS)
        if done.returncode:
            raise SystemExit(f"llama-cpp: {done.stderr.decode(errors='replace').strip()}")
        speed: float = json.loads(done.stdout)[0]["avg_ts"]
        return speed


@contextlib.contextmanager
def rpc_servers() -> Iterator[list[str]]:
    """Its servers on loopback; gone when the block ends."""
    with contextlib.ExitStack() as stack:
        addresses = []
        for _ in range(SERVERS):
            with socket.create_server((HOST, 0)) as free:
                port = free.getsockname()[1]
            command = [SERVER, "-H", HOST, "-p", str(port), "-t", THREADS]
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            stack.callback(process.kill)
            wait_for(port)
            addresses.append(f"{HOST}:{port}")
        yield addresses


def wait_for(port: int) -> None:
    """Return when something listens there."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((HOST, port)).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise SystemExit(f"llama-cpp: {SERVER} does not listen") from None
            time.sleep(0.05)
        else:
            return
