"""The demo model's card: what it is, what it read, how it learnt, what it writes."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from .text import BATCH, SEQUENCE
from .training import Run

PROMPTS = ["In the beginning", "And God said", "The king", "Blessed are"]

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [bloom, text-generation, demo]
---

# Demo model: a small BLOOM that writes biblical English

The model every installation carries, so that a swarm can be tried without a download. Trained
from nothing, in {minutes:g} minutes, on a {cores}-core CPU. It writes sentences in the manner of the
English Bible and knows nothing else: not a source of facts, of scripture or of advice.

| | |
|---|---|
| architecture | BLOOM (`BloomForCausalLM`): 8 blocks, hidden size 256, 8 heads, ALiBi, tied head |
| parameters | {parameters:,}, stored in float16 |
| tokenizer | byte-level BPE, {vocabulary:,} tokens; `<unk>` `<s>` `</s>` `<pad>`; `</s>` ends a chapter |
| trained on | sequences of {sequence} tokens; ALiBi carries it further |
| held-out perplexity | **{perplexity:.1f}** per token of this tokenizer, {bits:.2f} bits per byte |

## Text

- The King James Version (1611, in the standard text of 1769), from Debian's `bible-kjv`. In the
  public domain, except that the Crown's letters patent govern its printing in the United Kingdom.
- The World English Bible with Deuterocanon, from Debian's `sword-text-web`. Dedicated to the
  public domain by its translators. Its text was changed for training (notes, headings, verse
  numbers and typographic quotation marks removed), and what the model writes is not the World
  English Bible, a name that is a trademark of eBible.org.

A chapter is a document. {held_out_chapters} chapters, the same in both translations, were held out
({held_out_tokens:,} tokens); {train_tokens:,} tokens were left to train on. Esther (Greek) and
I Esdras, which retell other books, were left out. The weights are under this project's licence.

## Training

`{command}` on {date}, on a {cores}-core {machine} CPU that had other
work too, with torch {torch} and transformers {transformers}, in float32. Seed {seed}; {tokens:,}
tokens seen ({epochs:.1f} epochs) in batches of {batch} × {sequence}. Muon for the blocks' matrices, AdamW
for the rest. Training began with 2 of the 8 blocks and grew to 4 and to 8: a block joins as the
identity. The schedule follows the clock, so another machine, or the same one with other things to
do, gives other weights.

| step | tokens | minutes | blocks | training loss | held-out perplexity |
|---:|---:|---:|---:|---:|---:|
{curve}

## Samples

Written by the stored weights, loaded in float32; the prompt is in bold.

{samples}
"""


def card(folder: pathlib.Path, run: Run, arguments: argparse.Namespace) -> str:
    """The model card."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    best = run.best
    curve = [
        f"| {p.step:,} | {p.tokens:,} | {p.minutes:.1f} | {p.blocks} | {p.train_loss:.3f} "
        f"| {p.perplexity:.1f} |"
        for p in run.curve
    ]
    return CARD.format(
        parameters=model.num_parameters(),
        vocabulary=len(tokenizer),
        sequence=SEQUENCE,
        batch=BATCH,
        perplexity=best.perplexity,
        bits=math.log2(best.perplexity) * run.held_out_tokens / run.held_out_bytes,
        held_out_chapters=run.held_out_chapters,
        held_out_tokens=run.held_out_tokens,
        train_tokens=run.train_tokens,
        command=f"scripts/train_demo_model --minutes {arguments.minutes:g} --seed {arguments.seed}",
        date=datetime.datetime.now(tz=datetime.UTC).date(),
        cores=os.cpu_count(),
        machine=platform.machine().replace("_", "-"),
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        minutes=arguments.minutes,
        seed=arguments.seed,
        tokens=best.tokens,
        epochs=best.tokens / run.train_tokens,
        curve="\n".join(curve),
        samples="\n\n".join(samples(model, tokenizer)),
    )


def samples(model: Any, tokenizer: Any) -> Iterator[str]:  # transformers' types fit loosely
    """Text from every prompt, greedily and by chance, as Markdown."""
    ways = {
        "Greedy, repetition penalty 1.2": {"do_sample": False, "repetition_penalty": 1.2},
        "Sampled, temperature 0.7, top-p 0.9": {
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 0,
        },
    }
    for title, way in ways.items():
        yield f"### {title}"
        torch.manual_seed(0)
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=80, **way)[0]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            yield f"> **{prompt}**{text.removeprefix(prompt)}"
