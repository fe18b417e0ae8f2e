"""One session's decoding through the blocks, against what the memory's speed allows."""

from __future__ import annotations

from petals.inference.checkpoint import open_checkpoint
from petals.protocol.span import Span

from .local import Local, bits_a_weight, block_bytes, mode_label, modes
from .models import ModelSize
from .report import Aim, Curve, Picture, Report, Row, number
from .settings import Settings, fits_memory

AIMS = {"560m": 0.5, "1b7": 0.65, "7b1": 0.8, "176b": 0.8}
"""How much of the memory's speed decoding in 16 bit should reach."""


def measure(settings: Settings, report: Report) -> None:
    """All models in all dtypes, behind every context; drawn in one picture."""
    curves: list[Curve] = []
    for size in (*settings.whole, settings.block):
        folder = settings.folder(size, report)
        for mode in modes():
            label = mode_label(size, folder, mode)
            needed = size.num_blocks * block_bytes(open_checkpoint(folder), mode)
            if size.whole and not fits_memory(needed, label, report):
                continue
            written = size.written_blocks
            with Local(folder, mode, span=None if written is None else Span(0, written)) as local:
                curves += by_context(settings, report, local, size, label)
    report.pictures.append(
        Picture(
            "latency_by_context.png",
            "Decoding one session, through the blocks",
            "context, tokens",
            "ms a block",
            curves,
        )
    )


def by_context(
    settings: Settings, report: Report, local: Local, size: ModelSize, label: str
) -> list[Curve]:
    """Our curve and the bound's. The aim is for the first context."""
    session = local.open(settings.lengths[-1] + settings.tokens * size.num_blocks)
    blocks = len(local.span)
    steps = settings.tokens * size.num_blocks // blocks  # as much as of a whole model
    sixteen_bit = bits_a_weight(local.checkpoint, local.mode) < 17
    ours: dict[float, float] = {}
    bounds: dict[float, float] = {}
    for length in settings.lengths:
        session.fill(length)
        taken, speeds = settings.bandwidth.beside(
            {"ours": lambda: session.decode_blocks(steps)}, settings.rounds
        )
        speed = speeds["ours"]
        ours[length] = taken["ours"] / blocks * 1e3
        bounds[length] = local.read_bytes_a_token(length) / blocks / speed * 1e3
        aim = AIMS.get(size.name) if length == settings.lengths[0] else None
        report.add(
            Row(
                f"{label}: decode one session, KV {length}",
                ours[length],
                "ms a block",
                f"bound at {speed / 1e9:.1f} GB/s: {number(bounds[length])}",
                bounds[length] / ours[length],
                None if aim is None or not sixteen_bit else Aim(at_least=aim),
            )
        )
    session.close()
    return [Curve(label, ours), Curve(label, bounds, bound=True)]
