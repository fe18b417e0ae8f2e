"""The model that comes with the package, whatever its weights: it loads, and runs exactly."""

from pathlib import Path

import petals.inference
import pytest
import torch
from petals.inference.checkpoint import Checkpoint, open_checkpoint
from petals.inference.detokenizer import Detokenizer
from petals.inference.sampling import SamplingParams
from petals.protocol.span import Span
from support.engines import generate, serving
from support.tiny_bloom import reference_tokens
from transformers import BloomForCausalLM

FOLDER = Path(petals.inference.__file__).with_name("demo_model")
PROMPTS = ["In the beginning", "And God said unto Moses, Go", "The"]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("demo")


@pytest.fixture(scope="module")
def model() -> BloomForCausalLM:
    return BloomForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def test_it_is_what_the_issue_asks_for(checkpoint: Checkpoint) -> None:
    assert checkpoint.num_blocks >= 8
    assert checkpoint.fingerprint == open_checkpoint(FOLDER).fingerprint
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16 * 2**20


def test_greedy_and_sampled_text_equal_those_of_transformers(
    checkpoint: Checkpoint, model: BloomForCausalLM
) -> None:
    tokenizer = checkpoint.load_tokenizer()
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    pad, end = checkpoint.pad_token_id, checkpoint.eos_token_ids
    ends = checkpoint.load_ends()
    with serving(checkpoint, Span(0, 3), Span(3, checkpoint.num_blocks)) as engines:
        for batch in (prompts[:1], prompts):
            greedy = SamplingParams(max_new_tokens=40)
            expected = reference_tokens(model, batch, 40, pad_token_id=pad)
            tokens = generate(engines, ends, batch, greedy, eos_token_ids=end, pad_token_id=pad)
            assert tokens == expected
            torch.manual_seed(4)
            expected = reference_tokens(
                model, batch, 20, pad_token_id=pad, do_sample=True, temperature=0.8, top_k=30
            )
            sampled = SamplingParams(max_new_tokens=20, temperature=0.8, top_k=30, seed=4)
            assert expected == generate(
                engines, ends, batch, sampled, eos_token_ids=end, pad_token_id=pad
            )
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.add(token) for token in tokens[0]) + detokenizer.finish()
    assert text == tokenizer.decode(tokens[0], skip_special_tokens=True)
