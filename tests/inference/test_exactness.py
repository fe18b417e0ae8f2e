"""Whatever way a model is cut, batched and interleaved: the tokens are those of transformers."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from petals.inference.attention import LaneRows
from petals.inference.cache import LaneCache
from petals.inference.checkpoint import Checkpoint, open_checkpoint
from petals.inference.native import native
from petals.inference.pace import Pace
from petals.inference.sampling import SamplingParams
from petals.protocol.span import Span
from support.engines import Chain, generate, serving
from support.tiny_bloom import pad_left, reference_tokens, save_bloom, tiny_bloom
from transformers import BloomForCausalLM

PROMPTS = [[5, 6, 7, 8, 90, 91], [9], [3, 4, 20, 30, 40, 50, 60, 70, 80], [1, 2]]
GREEDY = SamplingParams(max_new_tokens=16)
VARIANTS: dict[str, dict[str, Any]] = {
    "six heads, tied": {},
    "five heads": {"hidden_size": 40, "n_head": 5},
    "power of two": {"n_head": 8},
    "one head": {"hidden_size": 8, "n_head": 1, "n_layer": 2},
    "untied": {"tie_word_embeddings": False},
    "post-layernorm residual": {"apply_residual_connection_post_layernorm": True},
    "other epsilon": {"layer_norm_epsilon": 1e-3},
}


@pytest.fixture(scope="module")
def model() -> BloomForCausalLM:
    return tiny_bloom()


@pytest.fixture(scope="module")
def checkpoint(model: BloomForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_bloom(tmp_path_factory.mktemp("bloom"), model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_config(variant: str, tmp_path: Path) -> None:
    model = tiny_bloom(**VARIANTS[variant])
    checkpoint = open_checkpoint(save_bloom(tmp_path, model))
    with serving(checkpoint, Span(0, 1), Span(1, checkpoint.num_blocks)) as engines:
        ends = checkpoint.load_ends()
        for prompts in ([PROMPTS[0]], PROMPTS):
            assert generate(engines, ends, prompts, GREEDY) == reference_tokens(model, prompts, 16)


@pytest.mark.parametrize("cuts", [(), (2,), (1, 4), (1, 2, 3, 4)])
def test_every_split_into_spans(
    model: BloomForCausalLM, checkpoint: Checkpoint, cuts: tuple[int, ...]
) -> None:
    bounds = (0, *cuts, 5)
    spans = [Span(start, end) for start, end in itertools.pairwise(bounds)]
    with serving(checkpoint, *spans) as engines:
        tokens = generate(engines, checkpoint.load_ends(), PROMPTS, GREEDY)
    assert tokens == reference_tokens(model, PROMPTS, 16)


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
@pytest.mark.parametrize("prefill_rows", [3, 512])
def test_chunked_prefill(
    model: BloomForCausalLM, checkpoint: Checkpoint, chunk: int, prefill_rows: int
) -> None:
    with serving(checkpoint, Span(0, 5), prefill_rows=prefill_rows) as engines:
        tokens = generate(engines, checkpoint.load_ends(), PROMPTS, GREEDY, chunk=chunk)
    assert tokens == reference_tokens(model, PROMPTS, 16)


def test_a_prompt_longer_than_the_first_capacity_of_cache_and_bias(
    model: BloomForCausalLM, checkpoint: Checkpoint
) -> None:
    prompt = [(7 * i) % 97 for i in range(300)]
    with serving(checkpoint, Span(0, 5), prefill_rows=64) as engines:
        tokens = generate(engines, checkpoint.load_ends(), [prompt], GREEDY)
    assert tokens == reference_tokens(model, [prompt], 16)


def test_heads_in_groups_when_masks_are_large(
    model: BloomForCausalLM, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petals.inference.attention._SCRATCH_BYTES", 700)
    with serving(checkpoint, Span(0, 5)) as engines:
        tokens = generate(engines, checkpoint.load_ends(), PROMPTS, GREEDY)
    assert tokens == reference_tokens(model, PROMPTS, 16)


def test_sessions_at_once_share_rounds_and_stay_exact(
    model: BloomForCausalLM, checkpoint: Checkpoint
) -> None:
    jobs = [PROMPTS, *([prompt] for prompt in PROMPTS), [PROMPTS[2], PROMPTS[0]]]
    ends = checkpoint.load_ends()
    with (
        serving(checkpoint, Span(0, 3), Span(3, 5), prefill_rows=4) as engines,
        ThreadPoolExecutor(len(jobs)) as pool,
    ):
        running = [
            pool.submit(generate, engines, ends, prompts, GREEDY, session_id=bytes([number]))
            for number, prompts in enumerate(jobs)
        ]
        for prompts, tokens in zip(jobs, running, strict=True):
            assert tokens.result() == reference_tokens(model, prompts, 16)
        for engine in engines:
            statistics = engine.statistics()
            assert statistics.steps == 16 * len(jobs)
            assert (statistics.sessions, statistics.queued, statistics.cache_tokens_used) == (
                0,
                0,
                0,
            )


def test_pieces_of_any_size_between_the_steps_of_others(
    model: BloomForCausalLM, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = itertools.cycle([1, 7, 2, 16, 3])
    monkeypatch.setattr(Pace, "prefill_rows", lambda *_: next(sizes))
    long = [(7 * i) % 97 for i in range(90)]
    jobs = [*([prompt] for prompt in PROMPTS), [long], PROMPTS]
    ends = checkpoint.load_ends()
    with (
        serving(checkpoint, Span(0, 2), Span(2, 5)) as engines,
        ThreadPoolExecutor(len(jobs)) as pool,
    ):
        running = [
            pool.submit(generate, engines, ends, prompts, GREEDY, session_id=bytes([number]))
            for number, prompts in enumerate(jobs)
        ]
        for prompts, tokens in zip(jobs, running, strict=True):
            assert tokens.result() == reference_tokens(model, prompts, 16)


def test_a_step_further_back_truncates_and_runs_again(
    model: BloomForCausalLM, checkpoint: Checkpoint
) -> None:
    ids = torch.tensor([PROMPTS[2]])
    ends = checkpoint.load_ends()
    with serving(checkpoint, Span(0, 2), Span(2, 5)) as engines:
        chain = Chain(engines, ends, session_id=b"s", batch=1, max_tokens=20)
        first = chain.step(0, ids)
        chain.step(9, torch.tensor([[50, 51, 52]]))
        again = chain.step(4, ids[:, 4:])
        torch.testing.assert_close(again, first[:, 4:], rtol=1e-4, atol=1e-4)
        edited = torch.tensor([[33, 44]])
        expected = model(torch.cat([ids[:, :2], edited], dim=1)).logits[:, 2:]
        torch.testing.assert_close(chain.step(2, edited), expected, rtol=1e-4, atol=1e-4)


def test_truncation_into_left_padding(model: BloomForCausalLM, checkpoint: Checkpoint) -> None:
    ids, mask = pad_left(PROMPTS)
    padding = tuple((mask == 0).sum(dim=1).tolist())
    ends = checkpoint.load_ends()
    with serving(checkpoint, Span(0, 5)) as engines:
        chain = Chain(engines, ends, session_id=b"s", batch=4, max_tokens=20, padding=padding)
        first = chain.step(0, ids)
        again = chain.step(3, ids[:, 3:])
        torch.testing.assert_close(again[:, -1], first[:, -1], rtol=1e-4, atol=1e-4)


def test_slow_but_exact_configs_run_on_the_plain_path(tmp_path: Path) -> None:
    model = tiny_bloom()
    model.config.slow_but_exact = True
    model.config.pretraining_tp = 4
    checkpoint = open_checkpoint(save_bloom(tmp_path, model))
    with serving(checkpoint, Span(0, 5)) as engines:
        tokens = generate(engines, checkpoint.load_ends(), PROMPTS, GREEDY)
    assert tokens == reference_tokens(tiny_bloom(), PROMPTS, 16)


@pytest.mark.skipif(native() is None, reason="our kernels cannot be had on this machine")
def test_a_checkpoint_in_bfloat16_gives_the_text_of_float32(tmp_path: Path) -> None:
    """By default, though its weights are held in 12 bits."""
    model = tiny_bloom().bfloat16()
    checkpoint = open_checkpoint(save_bloom(tmp_path, model))
    assert checkpoint.precision().name == "float32"
    with serving(checkpoint, Span(0, 2), Span(2, 5)) as engines:
        tokens = generate(engines, checkpoint.load_ends(), PROMPTS, GREEDY)
    assert tokens == reference_tokens(model.float(), PROMPTS, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_near_fp32(
    model: BloomForCausalLM, checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    outputs = []
    hidden = torch.randn((1, 40, 48), generator=torch.Generator().manual_seed(0))
    for precision in (torch.float32, dtype):
        blocks = checkpoint.load_blocks(Span(0, 1), precision)
        lane = LaneRows(LaneCache(blocks.cache_shape, 40), 40)
        outputs.append(blocks.run(hidden, blocks.plan([lane])))
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert error < 0.02


def test_generation_ends_at_the_end_of_text(tmp_path: Path) -> None:
    model = tiny_bloom()
    plain = reference_tokens(model, PROMPTS, 16)
    end = plain[2][2]
    with serving(open_checkpoint(save_bloom(tmp_path, model)), Span(0, 5)) as engines:
        ends = open_checkpoint(tmp_path).load_ends()
        tokens = generate(engines, ends, PROMPTS, GREEDY, eos_token_ids=[end])
    assert tokens == reference_tokens(model, PROMPTS, 16, eos_token_id=end)
