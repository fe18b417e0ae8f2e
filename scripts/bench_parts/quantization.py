"""``scripts/bench quantization``: how exact and how fast each way to hold weights, or to send rows.

Text is judged on the embedded model, which is trained but small: at a width of 256, quantisation
in groups errs more than at the widths that people share. Errors at a real width are those of one
7b1 block of random weights, on noise; so is the speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from petals.inference.checkpoint import open_checkpoint
from petals.inference.hub import DEMO
from petals.inference.model import Ends
from petals.protocol.span import Span
from petals.protocol.tensor import DType

from . import quantized_block
from .held_out import Judgement, held_out_rows, judge
from .local import FLOAT32, Local, Mode
from .report import Report, Row, Summary, number
from .settings import Settings

HOPS = 3
"""Over which hidden states travel where their wire dtype is judged."""


def run(settings: Settings, report: Report, parts: Sequence[str] | None) -> None:
    """Weights on text, wire dtypes on text, then weights in a real block."""
    if parts:
        raise SystemExit("--part: quantization has none")
    checkpoint = open_checkpoint(DEMO)
    rows = held_out_rows(checkpoint, settings.held_out_rows)
    ends = checkpoint.load_ends("float32")
    report.say(f"{rows.numel():,} tokens of held-out text")
    reference = through(Span(0, checkpoint.num_blocks), FLOAT32, DType.FLOAT32, ends, rows)
    exact = judge(ends, reference, reference, rows)

    summary = Summary(
        "Text of the embedded model; errors in % of the hidden states' RMS in float32",
        ("", "RMS error", "mean error", "greatest error", "top-1 agreement", "perplexity"),
        [],
    )
    report.summaries.append(summary)

    def add(name: str, hidden: torch.Tensor) -> None:
        found = judge(ends, hidden, reference, rows)
        tell(report, f"demo, {name}", found, exact)
        errors = (found.rms_error, found.mean_error, found.max_error, found.agreement)
        figures = [f"{number(100 * share)} %" for share in errors]
        summary.rows.append((name, *figures, f"{found.perplexity:.3f}"))

    for mode in quantized_block.MODES:
        span = Span(0, checkpoint.num_blocks)
        add(f"weights in {mode.name}", through(span, mode, DType.FLOAT32, ends, rows))
    for dtype in DType:
        add(f"{HOPS} hops, rows sent in {dtype}", over_hops(dtype, ends, rows))
    quantized_block.measure(settings, report)


def tell(report: Report, name: str, found: Judgement, exact: Judgement) -> None:
    """Rows of one judgement."""
    unit = "% of the hidden states' RMS in float32"
    report.add(Row(f"{name}: RMS error", 100 * found.rms_error, unit))
    report.add(Row(f"{name}: mean error", 100 * found.mean_error, unit))
    report.add(Row(f"{name}: greatest error", 100 * found.max_error, unit))
    report.add(
        Row(f"{name}: top-1 agreement", found.agreement * 100, "%", "float32: 100", found.agreement)
    )
    report.add(
        Row(
            f"{name}: held-out perplexity",
            found.perplexity,
            "a token",
            f"float32: {number(exact.perplexity)}",
            found.perplexity / exact.perplexity,
        )
    )


def through(span: Span, mode: Mode, dtype: DType, ends: Ends, rows: torch.Tensor) -> torch.Tensor:
    """What the demo model's blocks, held as ``mode`` says, make of the text, as float32."""
    with Local(DEMO, mode, span=span, wire=dtype) as local:
        return torch.cat([local.once(ends.embed(row[None, :-1])) for row in rows])


def over_hops(dtype: DType, ends: Ends, rows: torch.Tensor) -> torch.Tensor:
    """The same over several hops in float32 that send one another rows in ``dtype``."""
    blocks = open_checkpoint(DEMO).num_blocks
    edges = [blocks * hop // HOPS for hop in range(HOPS + 1)]
    hidden = [ends.embed(row[None, :-1]) for row in rows]
    for start, end in itertools.pairwise(edges):
        with Local(DEMO, FLOAT32, span=Span(start, end), wire=dtype) as local:
            hidden = [local.once(one) for one in hidden]
    return torch.cat(hidden)
