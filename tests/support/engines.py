"""A whole model on engines in one process, as a chain of hops would run it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from petals.inference.checkpoint import Checkpoint
from petals.inference.engine import Engine, Limits
from petals.inference.model import Ends
from petals.inference.sampling import Sampler, SamplingParams
from petals.inference.tensors import to_torch, to_wire
from petals.protocol.span import Span
from petals.protocol.tensor import DType
from support.tiny_bloom import pad_left


@contextmanager
def serving(
    checkpoint: Checkpoint, *spans: Span, cache_tokens: int = 4096, prefill_rows: int = 512
) -> Iterator[list[Engine]]:
    """An engine for each span, shut down at the end."""
    limits = Limits(prefill_rows=prefill_rows)
    engines = [
        Engine(checkpoint.load_blocks(span), cache_tokens=cache_tokens, limits=limits)
        for span in spans
    ]
    try:
        yield engines
    finally:
        for engine in engines:
            assert engine.shutdown(), "the engine's thread did not end"


class Chain:
    """One session through engines that hold consecutive spans."""

    def __init__(
        self,
        engines: Sequence[Engine],
        ends: Ends,
        *,
        session_id: bytes,
        batch: int,
        max_tokens: int,
        padding: tuple[int, ...] = (),
    ) -> None:
        self.engines = engines
        self.ends = ends
        self.session_id = session_id
        for engine in engines:
            engine.open(session_id, batch=batch, max_tokens=max_tokens, padding=padding)

    def step(self, position: int, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits fp32 ``[batch, rows, vocab]`` of int64 ``[batch, rows]``."""
        hidden = to_wire(self.ends.embed(token_ids))
        for engine in self.engines:
            hidden = engine.submit(
                self.session_id,
                position=position,
                hidden=hidden,
                wire_dtype=DType.FLOAT32,
                span=engine.blocks.span,
            ).result(timeout=60)
        return self.ends.logits(to_torch(hidden))

    def close(self) -> None:
        for engine in self.engines:
            engine.close(self.session_id)


def generate(
    engines: Sequence[Engine],
    ends: Ends,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    session_id: bytes = b"session",
    chunk: int = 1000,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
) -> list[list[int]]:
    """The new tokens of each prompt; the prompt goes in chunks of ``chunk`` rows."""
    ids, mask = pad_left(prompts)
    padding = tuple((mask == 0).sum(dim=1).tolist())
    length = ids.shape[1]
    chain = Chain(
        engines,
        ends,
        session_id=session_id,
        batch=len(prompts),
        max_tokens=length + params.max_new_tokens,
        padding=padding,
    )
    sampler = Sampler(
        params, ids, padding=padding, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id
    )
    for start in range(0, length, chunk):
        logits = chain.step(start, ids[:, start : start + chunk])
    for position in range(length, length + params.max_new_tokens):
        sampled = sampler.sample(logits[:, -1])
        if all(sampler.finished) or position == length + params.max_new_tokens - 1:
            break
        logits = chain.step(position, torch.tensor(sampled)[:, None])
    chain.close()
    return [row.tolist() for row in sampler.token_ids[:, length:]]
