"""``scripts/bench weights``: weights from a peer, against raw bytes: py-libp2p's, and over our transport.

Giver and fetcher are processes of their own, on loopback; what comes is hashed and written to the disk.
Then a session decodes at the node that gives, alone and while it gives: by itself a node slows down for
its sessions, so that the two rates are two different figures.
"""

from __future__ import annotations

import pathlib
import statistics
import threading
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import trio

from .json_process import JsonProcess
from .local import AUTO, mode_label, token_ids
from .loopback_swarm import LoopbackSwarm, loopback_swarm
from .report import Aim, Report, Row, number
from .settings import Settings, fits_memory
from .timing import interleaved

SHARE_OF_LIBRARY = 0.7
SLOWER_STEPS = 1.3
PROMPT = 32
LONG = 3600.0


def run(settings: Settings, report: Report, parts: Sequence[str] | None) -> None:
    """The first model that writes text."""
    if parts:
        raise SystemExit("--part: weights has none")
    size = settings.whole[0]
    if fits_memory(size.parameters * 6, f"{size.name} swarm", report):
        trio.run(measure, settings, report, settings.folder(size, report), size.name)


async def measure(settings: Settings, report: Report, folder: pathlib.Path, name: str) -> None:
    """Start everything, then take turns."""
    with TemporaryDirectory(prefix="petals-bench-") as fresh:
        async with loopback_swarm(folder, 1, AUTO.dtype) as swarm:
            giver = swarm.servers[0]
            with (
                JsonProcess("raw_sender") as sender,
                JsonProcess("library_peer") as library,
                JsonProcess("library_peer") as library_worker,
                JsonProcess("weights_worker", fresh) as worker,
            ):
                library_worker.answer()  # where it is, which nobody dials
                senders = {"giver": giver, "raw": sender.answer(), "library": library.answer()}
                transport(settings, report, name, senders, worker, library_worker)
                label = mode_label(settings.whole[0], folder, AUTO)
                await beside_a_session(settings, report, label, swarm, giver, worker)


def transport(
    settings: Settings,
    report: Report,
    name: str,
    senders: Mapping[str, Mapping[str, Any]],
    worker: JsonProcess,
    library_worker: JsonProcess,
) -> None:
    """How fast verified weights come, by how fast bytes do."""
    size = settings.fetched_bytes

    def rate(receiver: JsonProcess, **asked: Any) -> float:
        answer = receiver.ask(bytes=size, seconds=LONG, **asked)
        return float(answer["bytes"] / answer["seconds"])

    samples = interleaved(
        {
            "library": lambda: rate(library_worker, **senders["library"]),
            "raw": lambda: rate(worker, what="raw", **senders["raw"]),
            "weights": lambda: rate(worker, what="weights", **senders["giver"]),
        },
        settings.rounds,
    )
    library, raw, weights = (
        statistics.median(samples[each]) / 1e6 for each in ("library", "raw", "weights")
    )
    report.add(
        Row(
            f"{name}: weights from a peer",
            weights,
            "MB/s",
            f"py-libp2p's own Noise and Yamux: {number(library)} MB/s",
            weights / library,
            Aim(at_least=SHARE_OF_LIBRARY),
        )
    )
    report.add(
        Row(
            f"{name}: weights, hashed and on the disk",
            weights,
            "MB/s",
            f"raw stream over our transport: {number(raw)} MB/s",
            weights / raw,
        )
    )


async def beside_a_session(
    settings: Settings,
    report: Report,
    label: str,
    swarm: LoopbackSwarm,
    giver: Mapping[str, Any],
    worker: JsonProcess,
) -> None:
    """How long a session's steps take while the node that runs them gives weights."""
    prompt = token_ids(swarm.vocabulary, PROMPT, seed=1)
    alone, beside, rates = [], [], []
    for _ in range(settings.rounds + 1):  # the first one does not count
        alone.append((await swarm.write(prompt, settings.beside_tokens)).token)
        answers: list[dict[str, Any]] = []

        def fetch(answers: list[dict[str, Any]] = answers) -> None:
            # for as long as it takes: its end is told by hand
            answers.append(
                worker.ask(what="weights", bytes=1 << 50, seconds=settings.beside_seconds, **giver)
            )

        thread = threading.Thread(target=fetch)
        thread.start()
        times: list[float] = []
        while thread.is_alive():
            times.append((await swarm.write(prompt, settings.beside_tokens)).token)
        thread.join()
        beside.append(statistics.median(times[:-1] or times))
        rates.append(answers[0]["bytes"] / answers[0]["seconds"])
    step, slowed = statistics.median(alone[1:]), statistics.median(beside[1:])
    rate = statistics.median(rates[1:])
    report.add(
        Row(
            f"{label}: a session's step while weights are given",
            slowed * 1e3,
            "ms",
            f"alone {number(step * 1e3)} ms; given meanwhile: {number(rate / 1e6)} MB/s",
            slowed / step,
            Aim(at_most=SLOWER_STEPS),
        )
    )
