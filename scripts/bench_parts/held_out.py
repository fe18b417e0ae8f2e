"""Held-out text for the embedded model, and how well hidden states carry it.

``held_out.txt`` has twelve chapters that the demo model was not trained on, one a line: of the
World English Bible, which is in the public domain, with its notes, headings, verse numbers and
typographic quotation marks removed (``train_demo_model_parts/text.py``).
"""

from __future__ import annotations

import math
import pathlib
from dataclasses import dataclass

import torch
from petals.inference.checkpoint import Checkpoint
from petals.inference.model import Ends
from torch.nn import functional as F

TEXT = pathlib.Path(__file__).with_name("held_out.txt")
SEQUENCE = 256
"""Tokens that the model reads at a time, as in its training."""


def held_out_rows(checkpoint: Checkpoint, most: int) -> torch.Tensor:
    """int64 ``[rows, SEQUENCE + 1]``: inputs and, shifted by one, what comes next."""
    tokenizer = checkpoint.load_tokenizer()
    (end,) = checkpoint.eos_token_ids
    stream: list[int] = []
    for chapter in TEXT.read_text(encoding="utf-8").splitlines():
        stream += [*tokenizer(chapter, verbose=False)["input_ids"], end]
    return torch.tensor(stream).unfold(0, SEQUENCE + 1, SEQUENCE)[:most]


@dataclass(frozen=True)
class Judgement:
    """What hidden states are worth, in figures; errors are in units of the reference's RMS."""

    rms_error: float
    mean_error: float
    max_error: float
    agreement: float
    """Share of positions at which the likeliest token is the reference's."""
    perplexity: float


def judge(
    ends: Ends, hidden: torch.Tensor, reference: torch.Tensor, rows: torch.Tensor
) -> Judgement:
    """Judge ``hidden`` ``[rows, SEQUENCE, hidden_size]`` before the final norm, by ``reference``."""
    error = (hidden - reference).abs()
    scale = reference.square().mean().sqrt()
    losses, agreed = 0.0, 0
    for mine, theirs, row in zip(hidden, reference, rows, strict=True):
        logits = ends.logits(mine[None])[0]
        agreed += int((logits.argmax(-1) == ends.logits(theirs[None])[0].argmax(-1)).sum())
        losses += F.cross_entropy(logits, row[1:], reduction="sum").item()
    positions = hidden.shape[0] * hidden.shape[1]
    return Judgement(
        rms_error=float(error.square().mean().sqrt() / scale),
        mean_error=float(error.mean() / scale),
        max_error=float(error.max() / scale),
        agreement=agreed / positions,
        perplexity=math.exp(losses / positions),
    )
