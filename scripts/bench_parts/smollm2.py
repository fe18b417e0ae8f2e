"""``scripts/bench smollm2``: a model that people have, over three processes, against transformers.

SmolLM2-135M-Instruct, as ``scripts/fetch_smollm2`` writes it (it is fetched if it is not there). What
a token costs is the same whatever the text says, so that random prompts will do.
"""

from __future__ import annotations

import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
import transformers
import trio
from petals.inference.checkpoint import open_checkpoint

from .loopback_swarm import loopback_swarm
from .report import Report
from .rivals import Transformers
from .settings import Settings
from .swarm import Prompts
from .torch_thread import on_torch_thread

PROCESSES = 3
AT_LEAST = 1.0
"""Of the speed of transformers' ``generate`` in one process on the same cores."""
TEXT = 48
"""New tokens of a sample."""
SCRIPT = pathlib.Path(__file__).parents[1] / "fetch_smollm2"


def run(settings: Settings, report: Report, parts: Sequence[str] | None) -> None:
    """Decoding in one session, and a text as a whole, in turns."""
    if parts:
        raise SystemExit("--part: smollm2 has none")
    folder = settings.models / ("tiny-llama" if settings.quick else "smollm2")
    if not folder.exists():
        report.say(f"smollm2: making {folder}")
        if settings.quick:
            write_tiny(folder)
        else:
            subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True)
    trio.run(measure, settings, report, folder)


@on_torch_thread
def write_tiny(folder: pathlib.Path) -> None:
    """A random Llama, with some tokenizer."""
    demo = open_checkpoint("demo").load_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(demo),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=PROCESSES,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    demo.save_pretrained(folder)


async def measure(settings: Settings, report: Report, folder: pathlib.Path) -> None:
    """The swarm and transformers take turns."""
    length, tokens = settings.lengths[0], 4 if settings.quick else TEXT
    report.say(f"smollm2: starting {PROCESSES} processes that serve")
    async with loopback_swarm(folder, PROCESSES, "float32") as swarm:
        rival = Transformers(folder, torch.float32)
        rival.model.generation_config.eos_token_id = None  # random texts may end anywhere
        prompts = Prompts(rival.model.config.vocab_size)
        ours: list[tuple[float, float]] = []
        theirs: list[tuple[float, float]] = []
        for turn in range(settings.rounds + 1):
            prompt = prompts.new(length)
            written = await swarm.write(prompt, tokens)
            await trio.to_thread.run_sync(rival.prefill, prompt)
            each = await trio.to_thread.run_sync(rival.decode, tokens - 1)
            begin = time.perf_counter()
            await trio.to_thread.run_sync(rival.generate, prompt, tokens)
            whole = time.perf_counter() - begin
            if turn:
                ours.append((written.token, written.times[-1] - written.begin))
                theirs.append((each, whole))
    name = f"SmolLM2-135M float32, {PROCESSES} processes, KV {length}"
    for what, count, at, rival_name, at_least in (
        ("one session", 1, 0, "transformers' model in a bare loop", None),
        (f"a text of {tokens} tokens", tokens, 1, "transformers' generate", AT_LEAST),
    ):
        mine, others = (statistics.median(one[at] for one in taken) for taken in (ours, theirs))
        report.ahead(
            f"{name}: {what}", count / mine, "tokens/s", rival_name, count / others, at_least
        )
