"""A block of the largest model: loading it, its memory, and decoding in every mode."""

from __future__ import annotations

import pathlib
from contextlib import ExitStack
from functools import partial

from petals.inference.checkpoint import open_checkpoint

from .local import INT8, NF4, Mode, block_bytes, mode_label
from .models import ModelSize
from .report import Aim, Curve, Picture, Report, Row, number
from .settings import Settings, fits_memory
from .timing import Sampler, timed
from .worker import Worker

PEAK_AIMS = {"none": 1.15, "int8": 1.0, "nf4": 1.0}
"""Peak memory while loading, over the block's size in 16 bit."""
BOUND_AIM = 0.8
READ_AT_ONCE = 2**24


def measure(settings: Settings, report: Report) -> None:
    """Load it in each mode, a process for each; then decode in turns."""
    size = settings.large_block
    folder = settings.folder(size, report)
    sixteen_bit = Mode(open_checkpoint(folder).precision().name)
    whole = 2 * open_checkpoint(folder).block_parameters()
    with ExitStack() as stack:
        workers: list[Worker] = []
        for mode in (sixteen_bit, INT8, NF4):
            label = f"{mode_label(size, folder, mode)}: a block"
            if fits_memory(1.2 * whole, label, report):
                report.say(f"{label}: loading")
                reading = timed(lambda: read_all(folder))
                workers.append(stack.enter_context(Worker(folder, mode)))
                tell_of_loading(report, label, workers[-1], reading, whole)
        if workers:
            decoding(settings, report, size, folder, workers)


def read_all(folder: pathlib.Path) -> None:
    """Read all weights of a model once: what loading them cannot be faster than."""
    buffer = bytearray(READ_AT_ONCE)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def tell_of_loading(report: Report, label: str, worker: Worker, reading: float, whole: int) -> None:
    """Rows of how long it took and of the memory that it needed; ``whole`` is its 16-bit size."""
    figures = worker.loaded
    seconds = figures["seconds"]
    rival = f"reading the file from the page cache: {number(reading)}"
    report.add(Row(f"{label}: load", seconds, "s", rival, reading / seconds))
    aim = Aim(at_most=PEAK_AIMS[worker.mode.quantization])
    for name, words, aimed in (
        ("peak", "peak of resident memory while loading, mapped files included", aim),
        ("anonymous_peak", "peak of memory of its own while loading", None),
        ("held", "memory of its own once loaded", None),
    ):
        report.add(
            Row(
                f"{label}: {words}",
                figures[name] / 1e9,
                "GB",
                f"its size in 16 bit: {number(whole / 1e9)}",
                figures[name] / whole,
                aimed,
            )
        )


def decoding(
    settings: Settings,
    report: Report,
    size: ModelSize,
    folder: pathlib.Path,
    workers: list[Worker],
) -> None:
    """Rows of decoding behind the shortest context, and a picture of all of them."""
    curves: dict[Mode, dict[float, float]] = {worker.mode: {} for worker in workers}
    for length in settings.lengths[::2]:  # every other one: a long prefill takes its time here
        samplers: dict[str, Sampler] = {
            worker.mode.name: partial(worker.decode, length=length, steps=settings.tokens)
            for worker in workers
        }
        taken, speeds = settings.bandwidth.beside(samplers, settings.rounds)
        for mode, curve in curves.items():
            curve[length] = taken[mode.name] * 1e3
        if length == settings.lengths[0]:
            tell_of_decoding(report, size, folder, workers, taken, speeds, length)
    report.pictures.append(
        Picture(
            "large_block.png",
            f"Decoding one session through a block of {size.name}",
            "context, tokens",
            "ms a block",
            [Curve(mode_label(size, folder, mode), points) for mode, points in curves.items()],
        )
    )


def tell_of_decoding(
    report: Report,
    size: ModelSize,
    folder: pathlib.Path,
    workers: list[Worker],
    taken: dict[str, float],
    speeds: dict[str, float],
    length: int,
) -> None:
    """Rows of each mode against the memory's speed, and of the quantised against 16 bit."""
    checkpoint = open_checkpoint(folder)
    sixteen_bit = workers[0].mode
    for worker in workers:
        mode = worker.mode
        seconds, speed = taken[mode.name], speeds[mode.name]
        read = block_bytes(checkpoint, mode) + length * worker.loaded["cache_bytes"]
        row = f"{mode_label(size, folder, mode)}: decode one session, KV {length}"
        report.add(
            Row(
                row,
                seconds * 1e3,
                "ms a block",
                f"bound at {speed / 1e9:.1f} GB/s: {number(read / speed * 1e3)}",
                read / speed / seconds,
                Aim(at_least=BOUND_AIM) if mode is sixteen_bit else None,
            )
        )
        if mode is not sixteen_bit:
            rival, theirs = sixteen_bit.name, taken[sixteen_bit.name]
            report.ahead(row, 1 / seconds, "tokens/s through the block", rival, 1 / theirs, 1.0)
