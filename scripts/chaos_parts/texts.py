"""What sessions write, and what they should: transformers' own text, in float32, in one process."""

from __future__ import annotations

import pathlib
import random
from dataclasses import dataclass
from typing import Any

import torch
from petals.inference.sampling_params import SamplingParams
from transformers import AutoModelForCausalLM, AutoTokenizer

_PHRASES = (
    "In the beginning",
    "And it came to pass in those days, that there went out a decree",
    "The king",
    "Who art thou, lord of the house?",
    "And God said",
    "Blessed are they that",
    "The word of Yahweh came to",
    "Now these are the names of the children",
    "He that hath ears",
)
COUNT = 16
"""Different texts; sessions take them in turn."""


@dataclass(frozen=True)
class Text:
    """One text, or a batch of them, and what makes it."""

    prompts: tuple[str, ...]
    params: SamplingParams
    expected: tuple[tuple[int, ...], ...]
    """New tokens of each prompt."""


def make_texts(folder: pathlib.Path, seed: int, tokens: int) -> list[Text]:
    """Greedy and seeded, one sequence and several, short prompts and long ones."""
    dice = random.Random(seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    texts = []
    for number in range(COUNT):
        batch = 4 if number % 4 == 3 else 1
        prompts = tuple(
            " ".join(dice.choice(_PHRASES) for _ in range(dice.choice((1, 2, 3, 12))))
            for _ in range(batch)
        )
        sampled: dict[str, Any] = {}
        if number % 2:
            sampled = {"temperature": 0.8, "top_p": 0.95, "seed": dice.randrange(2**31)}
        params = SamplingParams(max_new_tokens=tokens, repetition_penalty=1.2, **sampled)
        texts.append(Text(prompts, params, generate(model, tokenizer, prompts, params)))
    return texts


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompts: tuple[str, ...], params: SamplingParams
) -> tuple[tuple[int, ...], ...]:
    """The new tokens of each prompt, up to and with the end of text."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    options: dict[str, Any] = {"do_sample": not params.greedy}
    if params.seed is not None:
        options |= {"temperature": params.temperature, "top_p": params.top_p, "top_k": 0}
        torch.manual_seed(params.seed)
    output = model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=params.max_new_tokens,
        repetition_penalty=params.repetition_penalty,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    new = output[:, batch["input_ids"].shape[1] :].tolist()
    end = model.generation_config.eos_token_id
    return tuple(tuple(row[: row.index(end) + 1] if end in row else row) for row in new)
