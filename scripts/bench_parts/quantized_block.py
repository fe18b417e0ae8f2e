"""Every way to hold weights, at a width that people share: error, memory and speed of one block."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from petals.inference.checkpoint import open_checkpoint
from petals.protocol.span import Span
from petals.protocol.tensor import DType

from .local import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    NF4,
    Local,
    LocalSession,
    bits_a_weight,
    noise,
)
from .report import Report, Row, Summary, number
from .settings import Settings
from .timing import Sampler, medians

MODES = (FLOAT32, FLOAT16, BFLOAT16, INT8, NF4)
NOISE_ROWS = 32
COLUMNS = ("", "RMS error", "greatest error", "bits a weight", "decode", "prefill")


def measure(settings: Settings, report: Report) -> None:
    """Error against float32 on noise, and decoding and prefill in turns."""
    size, length = settings.block, settings.lengths[0]
    folder = settings.folder(size, report)
    with ExitStack() as stack:
        nodes = {
            mode: stack.enter_context(Local(folder, mode, span=Span(0, 1), wire=DType.FLOAT32))
            for mode in MODES
        }
        inputs = noise(nodes[FLOAT32], NOISE_ROWS)
        outputs = {mode: node.once(inputs) for mode, node in nodes.items()}
        sessions = {mode: node.open(length + settings.tokens) for mode, node in nodes.items()}
        prefill = medians(
            {mode.name: prefiller(session, length) for mode, session in sessions.items()},
            settings.rounds,
        )
        decode = medians(
            {mode.name: decoder(one, settings.tokens) for mode, one in sessions.items()},
            settings.rounds,
        )
    summary = Summary(
        f"A {size.name} block of random weights on noise; errors in % of the output's RMS in "
        f"float32; tokens/s through the block, KV {length}",
        COLUMNS,
        [],
    )
    report.summaries.append(summary)
    for mode in MODES:
        name = f"{size.name} block, weights in {mode.name}"
        errors = tell_of_error(report, name, outputs[mode], outputs[FLOAT32])
        bits = bits_a_weight(open_checkpoint(folder), mode)
        report.add(Row(f"{name}: memory", bits, "bits a weight", "float32: 32", 32 / bits))
        speeds = []
        for what, taken, tokens in (
            (f"decode one session, KV {length}", decode, 1),
            (f"prefill of {length} tokens", prefill, length),
        ):
            ours, theirs = tokens / taken[mode.name], tokens / taken[FLOAT16.name]
            report.ahead(f"{name}: {what}", ours, "tokens/s through the block", "float16", theirs)
            speeds.append(number(ours))
        figures = [f"{number(error)} %" for error in errors]
        summary.rows.append((mode.name, *figures, number(bits), *speeds))


def tell_of_error(
    report: Report, name: str, output: torch.Tensor, reference: torch.Tensor
) -> tuple[float, float]:
    """Rows of the error of ``output``; the RMS and the greatest one, in % of the RMS."""
    error = 100 * (output - reference).abs() / reference.square().mean().sqrt()
    unit = "% of the output's RMS in float32"
    rms, greatest = float(error.square().mean().sqrt()), float(error.max())
    report.add(Row(f"{name}: RMS error", rms, unit))
    report.add(Row(f"{name}: mean error", float(error.mean()), unit))
    report.add(Row(f"{name}: greatest error", greatest, unit))
    return rms, greatest


def prefiller(session: LocalSession, length: int) -> Sampler:
    """Samples the seconds of a prefill."""

    def prefill() -> float:
        session.length = 0
        return session.fill(length)

    return prefill


def decoder(session: LocalSession, tokens: int) -> Sampler:
    """Samples the seconds of a decoding step."""
    return lambda: session.decode_blocks(tokens)
