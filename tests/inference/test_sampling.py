"""The sampler chooses what ``generate`` chooses."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from petals.inference.sampling import Sampler, SamplerState, SamplingParams
from petals.protocol.errors import ConfigError, LocalProtocolError, ModelError
from support.tiny_bloom import pad_left, reference_tokens, tiny_bloom
from transformers import BloomForCausalLM

PROMPTS = [[5, 6, 7, 8, 90, 91], [9], [3, 4, 20, 30, 40, 50, 60, 70, 80], [1, 2]]


@pytest.fixture(scope="module")
def model() -> BloomForCausalLM:
    return tiny_bloom()


def sample(
    model: BloomForCausalLM, prompts: list[list[int]], params: SamplingParams, **options: Any
) -> list[list[int]]:
    """Our sampler on transformers' own logits."""
    ids, mask = pad_left(prompts)
    length = ids.shape[1]
    padding = [int(row.sum()) for row in mask == 0]
    sampler = Sampler(params, ids, padding=padding, **options)
    while sampler.token_ids.shape[1] < length + params.max_new_tokens:
        grown = sampler.token_ids.shape[1] - length
        whole = torch.cat([mask, torch.ones((len(prompts), grown), dtype=torch.int64)], dim=1)
        with torch.inference_mode():
            logits = model(sampler.token_ids, attention_mask=whole).logits[:, -1]
        sampler.sample(logits)
    return [row[length:].tolist() for row in sampler.token_ids]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "batch"])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.5},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.5},
        {},
    ],
    ids=str,
)
def test_tokens_equal_those_of_generate(
    model: BloomForCausalLM, prompts: list[list[int]], settings: dict[str, Any]
) -> None:
    ours = sample(model, prompts, SamplingParams(max_new_tokens=12, seed=7, **settings))
    options: dict[str, Any] = settings | {"do_sample": "temperature" in settings}
    if options["do_sample"]:
        options.setdefault("top_k", 0)
    torch.manual_seed(7)
    assert ours == reference_tokens(model, prompts, 12, **options)


def test_seeds(model: BloomForCausalLM) -> None:
    def text(seed: int | None) -> list[list[int]]:
        return sample(model, PROMPTS, SamplingParams(max_new_tokens=8, temperature=2.0, seed=seed))

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(None) != text(None)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"seed": 7}, {"seed": None}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_sampler_goes_on_from_the_state_of_another(
    batch: int, settings: dict[str, Any], temperature: float
) -> None:
    """Whichever token it was that another one ended with."""
    params = SamplingParams(temperature=temperature, repetition_penalty=1.2, **settings)
    options: dict[str, Any] = {"padding": [1] * batch, "eos_token_ids": [0], "pad_token_id": 8}
    steps = torch.randn(8, batch, 9, generator=torch.Generator().manual_seed(3))
    whole = Sampler(params, [[1, 2]] * batch, **options)
    begun, states = whole.token_ids, [whole.state()]
    for number, logits in enumerate(steps):
        whole.sample(logits)
        if number == 3:
            whole.finish(0)
        states.append(whole.state())
    for done, state in enumerate(states):
        ids = whole.token_ids[:, : begun.shape[1] + done]
        rest = Sampler(params, ids, state=state, **options)
        assert rest.state() == state
        for number, logits in enumerate(steps[done:], start=done):
            rest.sample(logits)
            if number == 3:
                rest.finish(0)
        assert torch.equal(rest.token_ids, whole.token_ids)
        assert rest.state() == states[-1]


def test_a_fresh_state_is_no_state() -> None:
    params = SamplingParams(temperature=1.0, seed=5)
    logits = torch.linspace(-1, 1, 9)[None]
    fresh = SamplerState((False,))
    assert Sampler(params, [[1]], state=fresh).state() == Sampler(params, [[1]]).state()
    assert Sampler(params, [[1]], state=fresh).sample(logits) == Sampler(params, [[1]]).sample(
        logits
    )


@pytest.mark.parametrize("change", ["truncated", "nonsense"])
def test_a_generator_that_is_none_is_told(change: str) -> None:
    params = SamplingParams(temperature=1.0)
    state = Sampler(params, [[1]]).state()
    bad = state.generator[:-1] if change == "truncated" else b"x" * len(state.generator)
    with pytest.raises(ConfigError, match="random generator is not one of torch"):
        Sampler(params, [[1]], state=dataclasses.replace(state, generator=bad))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    Sampler(SamplingParams(temperature=1.0, seed=3), [[1]]).sample(torch.randn(1, 9) * 0)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), expected)


def test_finished_rows_get_padding() -> None:
    sampler = Sampler(SamplingParams(), [[1], [2], [3]], eos_token_ids=[4, 5], pad_token_id=8)
    sampler.finish(2)
    logits = torch.zeros(3, 9)
    logits[0, 5] = logits[1, 6] = logits[2, 6] = 1
    assert sampler.sample(logits) == [5, 6, 8]
    assert sampler.finished == (True, False, True)
    assert sampler.sample(logits) == [8, 6, 8]
    assert sampler.token_ids.tolist() == [[1, 5, 8], [2, 6, 6], [3, 8, 8]]


def test_the_logits_are_not_changed() -> None:
    logits = torch.randn(1, 9)
    before = logits.clone()
    params = SamplingParams(temperature=0.5, top_k=2, top_p=0.5, repetition_penalty=2.0)
    Sampler(params, [[1, 2]]).sample(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("changed", "enough"),
    [
        ({}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.7}, False),
        ({"logprobs": 0}, False),
        ({"repetition_penalty": 1.2}, False),
        ({"presence_penalty": 0.5}, False),
    ],
)
def test_the_largest_logit_is_enough_for_plain_greedy_text(
    changed: dict[str, Any], *, enough: bool
) -> None:
    params = SamplingParams(max_new_tokens=2, **changed)
    assert Sampler(params, [[1, 2]]).largest_only is enough


def test_misuse_and_nonsense_are_told() -> None:
    with pytest.raises(LocalProtocolError, match="prompt_ids must be"):
        Sampler(SamplingParams(), torch.tensor([1, 2]))
    with pytest.raises(LocalProtocolError, match="padding for 2 rows"):
        Sampler(SamplingParams(), [[1]], padding=[0, 0])
    with pytest.raises(LocalProtocolError, match="state of 2 rows"):
        Sampler(SamplingParams(), [[1]], state=SamplerState((False, False)))
    with pytest.raises(LocalProtocolError, match="logits must be"):
        Sampler(SamplingParams(), [[1]]).sample(torch.zeros(2, 9))
    with pytest.raises(ModelError, match="NaN"):
        Sampler(SamplingParams(), [[1]]).sample(torch.full((1, 9), torch.nan))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", True, "whole number"),
        ("max_new_tokens", 1.5, "whole number"),
        ("temperature", -0.1, "from 1e-06 to 1000"),
        ("temperature", 1e-9, "from 1e-06 to 1000"),
        ("temperature", float("nan"), "finite"),
        ("temperature", "hot", "finite number"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", float("inf"), "finite"),
        ("top_k", -1, "at least 0"),
        ("repetition_penalty", 0, "above 0 and at most 1000"),
        ("repetition_penalty", 1e9, "above 0 and at most 1000"),
        ("frequency_penalty", 1001, "from -1000 to 1000"),
        ("presence_penalty", "much", "finite number"),
        ("logprobs", -1, "from 0 to 20"),
        ("logprobs", 21, "from 0 to 20"),
        ("seed", -1, "from 0 to 9223372036854775807"),
        ("seed", 2**63, "from 0 to 9223372036854775807"),
        ("stop", "text", "tuple of non-empty strings"),
        ("stop", ("",), "tuple of non-empty strings"),
        ("stop", (1,), "tuple of non-empty strings"),
    ],
)
def test_parameters_out_of_range(field: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: .*{allowed}"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


@given(
    temperature=st.just(0.0) | st.floats(1e-6, 1000),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 10**6),
    penalty=st.floats(0, 1000, exclude_min=True),
    seed=st.none() | st.integers(0, 2**63 - 1),
)
def test_whatever_is_allowed_gives_a_token(
    temperature: float, top_p: float, top_k: int, penalty: float, seed: int | None
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=penalty,
        seed=seed,
    )
    (token,) = Sampler(params, [[1, 2]]).sample(torch.linspace(-30, 30, 9)[None])
    assert 0 <= token < 9


def test_a_list_of_stops_becomes_a_tuple() -> None:
    assert SamplingParams(stop=["a"]).stop == ("a",)  # type: ignore[arg-type]


def test_frequency_and_presence_count_the_new_tokens_only() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    params = SamplingParams(frequency_penalty=0.75, presence_penalty=0.5)
    sampler = Sampler(params, [[0, 0, 0], [1, 1, 1]])
    by_hand: list[list[int]] = []
    counts = torch.zeros(2, 4)
    for _ in range(8):
        scores = logits - 0.75 * counts - 0.5 * (counts > 0)
        tokens = scores.argmax(-1)
        counts[torch.arange(2), tokens] += 1
        by_hand.append(tokens.tolist())
    assert [sampler.sample(logits) for _ in range(8)] == by_hand
    assert len({tokens[0] for tokens in by_hand}) > 1


def test_penalties_go_on_where_the_prompt_ended() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    params = SamplingParams(frequency_penalty=0.75, presence_penalty=-0.5)
    whole = Sampler(params, [[3, 3]])
    tokens = [whole.sample(logits)[0] for _ in range(8)]
    rest = Sampler(params, [[3, 3, *tokens[:4]]], begin=2)
    assert [rest.sample(logits)[0] for _ in range(4)] == tokens[4:]


def test_logprobs_are_those_of_the_model_itself() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(logprobs=3, temperature=2.0, top_k=5, seed=1, presence_penalty=1.5)
    sampler = Sampler(params, [[1], [2]])
    own = torch.log_softmax(logits, dim=-1)
    for _ in range(3):
        tokens = sampler.sample(logits)
        for row, (token, told) in enumerate(zip(tokens, sampler.logprobs, strict=True)):
            assert told.logprob == own[row, token].item()
            values, ids = own[row].topk(3)
            assert told.top == tuple(zip(ids.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize(("asked", "told"), [(None, []), (0, [0]), (9, [4])])
def test_logprobs_are_kept_as_asked_for(asked: int | None, told: list[int]) -> None:
    sampler = Sampler(SamplingParams(logprobs=asked), [[1]])
    sampler.sample(torch.zeros(1, 4))
    assert [len(token.top) for token in sampler.logprobs] == told
