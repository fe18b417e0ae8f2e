"""The demo model's training: a loop that ends when its time is used up."""

from __future__ import annotations

import dataclasses
import math
import time

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BloomForCausalLM, PreTrainedTokenizerFast

from .model import DEPTHS, Muon, blocks_of, grow, new_model, set_fast
from .text import BATCH, SEQUENCE, batches, rows, tokenize

EVALUATIONS = 12
MUON_RATE = 8e-3
ADAM_RATE = 4e-3


@dataclasses.dataclass(frozen=True)
class Point:
    """A row of the loss curve."""

    step: int
    tokens: int
    minutes: float
    blocks: int
    train_loss: float
    perplexity: float


@dataclasses.dataclass
class Run:
    """What training leaves behind: how it went, and the weights that did best on held-out text."""

    train_tokens: int
    held_out_chapters: int
    held_out_tokens: int
    held_out_bytes: int
    curve: list[Point] = dataclasses.field(default_factory=list)
    weights: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> Point:
        """The best of those with every block in use."""
        full = [point for point in self.curve if point.blocks == DEPTHS[-1][1]]
        return min(full, key=lambda point: point.perplexity)


def loss_of(model: BloomForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.inference_mode()
def perplexity(model: BloomForCausalLM, held_out: torch.Tensor) -> float:
    parts = held_out.split(BATCH)
    mean = sum(loss_of(model, part).item() * len(part) for part in parts) / len(held_out)
    return math.exp(mean)


def optimizers(model: BloomForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding, norms and biases."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    embedding = model.transformer.word_embeddings.weight
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [
        Muon(matrices, lr=MUON_RATE, momentum=0.95, decay=0.1),
        torch.optim.AdamW(
            [
                {"params": [embedding], "weight_decay": 0.1},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=ADAM_RATE,
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]


def rate(done: float) -> float:
    """The learning rate's factor: a short rise, a plateau, a long way down."""
    return min(done / 0.03 + 0.02, 1.0, (1 - done) / 0.6)


def train(
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    held_out_texts: list[str],
    seconds: float,
    seed: int,
) -> Run:
    """Train a new model until the time is used up."""
    documents = tokenize(tokenizer, texts)
    held_out_documents = tokenize(tokenizer, held_out_texts)
    held_out = rows(held_out_documents)
    run = Run(
        train_tokens=sum(map(len, documents)),
        held_out_chapters=len(held_out_texts) // 2,
        held_out_tokens=sum(map(len, held_out_documents)),
        held_out_bytes=sum(len(text.encode()) + 1 for text in held_out_texts),
    )
    model = new_model(seed)
    blocks = blocks_of(model)
    set_fast(model)
    steppers = optimizers(model)
    groups = [(group, group["lr"]) for stepper in steppers for group in stepper.param_groups]
    losses: list[float] = []
    stream = batches(documents, seed)
    start = time.monotonic()
    step, done = 0, 0.0
    while done < 1:
        step += 1
        done = min((time.monotonic() - start) / seconds, 1.0)
        grow(model, blocks, done)
        for group, highest in groups:
            group["lr"] = highest * rate(done)
        loss = loss_of(model, next(stream))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        model.zero_grad()
        losses.append(loss.item())
        if done >= (len(run.curve) + 1) / EVALUATIONS:
            point = Point(
                step=step,
                tokens=step * BATCH * SEQUENCE,
                minutes=(time.monotonic() - start) / 60,
                blocks=len(model.transformer.h),
                train_loss=sum(losses) / len(losses),
                perplexity=perplexity(model, held_out),
            )
            losses.clear()
            run.curve.append(point)
            print(point, flush=True)
            if point.blocks == len(blocks) and point is run.best:
                run.weights = {k: v.half() for k, v in model.state_dict().items()}
    return run
