"""What a client may ask of the API, and how it is told what cannot be."""

import json
from typing import Any

import pytest
from petals.node.api.errors import ApiError, of_petals
from petals.node.api.requests import ChatRequest, CompletionRequest, GenerationRequest, parse
from petals.protocol.errors import (
    CacheFull,
    ConfigError,
    ModelError,
    NoRoute,
    PeerError,
    PetalsError,
)

COMPLETION = {"model": "demo", "prompt": "And God said"}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({**COMPLETION, **fields}).encode())


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({**CHAT, **fields}).encode())


def test_the_defaults_are_those_of_openai() -> None:
    params = completion().sampling(16)
    assert completion().wanted_tokens() == (16, True)
    assert chat().wanted_tokens()[1] is False
    assert (params.temperature, params.top_p, params.seed, params.stop) == (1.0, 1.0, None, ())
    assert params.logprobs is None


def test_null_is_the_default() -> None:
    names = ("max_tokens", "n", "temperature", "stop", "seed", "logprobs", "suffix", "stream")
    assert completion(**dict.fromkeys(names)) == completion()


def test_unknown_fields_and_those_that_change_nothing_are_ignored() -> None:
    assert completion(user="me", whatever=[1], echo=False, best_of=1) == completion()
    assert chat(tools=[], tool_choice="auto", store=True, metadata={"a": "b"}) == chat()


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_has_four_forms(prompt: Any, read: Any) -> None:
    assert completion(prompt=prompt).prompt == read


def test_a_conversation_as_its_client_writes_it() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    asked = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts},
        ],
        max_tokens=5,
        max_completion_tokens=7,
        logprobs=True,
        top_logprobs=2,
    )
    assert [(turn.role, turn.content) for turn in asked.messages] == [
        ("system", "Be brief."),
        ("user", "Hello"),
    ]
    assert asked.wanted_tokens() == (7, True)
    assert asked.sampling(7).logprobs == 2


def test_what_is_asked_becomes_sampling() -> None:
    params = completion(
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        repetition_penalty=1.2,
        frequency_penalty=-2,
        presence_penalty=1.5,
        seed=-1,
        stop="end",
        logprobs=2,
    ).sampling(9)
    assert params.max_new_tokens == 9
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 3)
    assert (params.repetition_penalty, params.frequency_penalty) == (1.2, -2)
    assert (params.presence_penalty, params.stop, params.logprobs) == (1.5, ("end",), 2)
    assert params.seed == 2**63 - 1
    assert completion(top_p=0, temperature=1).sampling(1).greedy


@pytest.mark.parametrize(
    ("kind", "fields", "param", "told"),
    [
        (CompletionRequest, {"model": None}, "model", "required"),
        (CompletionRequest, {"prompt": None}, "prompt", "required"),
        (CompletionRequest, {"prompt": []}, "prompt", "must be a string, a list"),
        (CompletionRequest, {"prompt": [1, "a"]}, "prompt", "must be a string, a list"),
        (CompletionRequest, {"prompt": [True]}, "prompt", "must be a string, a list"),
        (CompletionRequest, {"prompt": "\ud800"}, "prompt", "Unicode"),
        (CompletionRequest, {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        (CompletionRequest, {"max_tokens": "9"}, "max_tokens", "valid integer"),
        (CompletionRequest, {"temperature": 2.1}, "temperature", "less than or equal to 2"),
        (CompletionRequest, {"temperature": float("nan")}, "temperature", "finite"),
        (CompletionRequest, {"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        (CompletionRequest, {"frequency_penalty": 3}, "frequency_penalty", "less than"),
        (CompletionRequest, {"presence_penalty": -3}, "presence_penalty", "greater than"),
        (CompletionRequest, {"n": 65}, "n", "less than or equal to 64"),
        (CompletionRequest, {"logprobs": 6}, "logprobs", "less than or equal to 5"),
        (CompletionRequest, {"stop": [""]}, "stop", "not empty"),
        (CompletionRequest, {"stop": ["a"] * 5}, "stop", "up to 4"),
        (CompletionRequest, {"seed": 2**63}, "seed", "less than"),
        (CompletionRequest, {"echo": True, "logprobs": 1}, "echo", "not supported together"),
        (CompletionRequest, {"best_of": 3}, "best_of", "not supported"),
        (CompletionRequest, {"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
        (CompletionRequest, {"stream_options": {}}, "stream_options", "only for a request"),
        (ChatRequest, {"messages": []}, "messages", "at least 1"),
        (ChatRequest, {"messages": [{"role": "tool"}]}, "messages[0].role", "no tools here"),
        (ChatRequest, {"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "must be a string or a list",
        ),
        (ChatRequest, {"tools": [{"type": "function"}]}, "tools", "not supported"),
        (ChatRequest, {"response_format": {"type": "json_object"}}, "response_format", "not sup"),
        (ChatRequest, {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        (ChatRequest, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than"),
    ],
)
def test_what_cannot_be_is_told_by_its_name(
    kind: type[GenerationRequest], fields: dict[str, Any], param: str, told: str
) -> None:
    good = COMPLETION if kind is CompletionRequest else CHAT
    with pytest.raises(ApiError) as caught:
        parse(kind, json.dumps({**good, **fields}).encode())
    error = caught.value.body()["error"]
    assert (caught.value.status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert told in error["message"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "must be a JSON object"),
    ],
)
def test_bodies_that_are_no_request(body: bytes, told: str) -> None:
    with pytest.raises(ApiError, match=told) as caught:
        parse(CompletionRequest, body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (ConfigError("x"), 400, None),
        (ModelError("x"), 500, None),
        (NoRoute("x"), 503, "5"),
        (PeerError("x"), 503, "5"),
        (PetalsError("x"), 503, "5"),
        (CacheFull("x", retry_after=1.2), 503, "2"),
        (CacheFull("x", retry_after=None), 503, None),
    ],
)
def test_our_errors_have_a_status(error: PetalsError, status: int, retry_after: str | None) -> None:
    response = of_petals(error).response()
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    told = json.loads(bytes(response.body))["error"]
    assert told.keys() == {"message", "type", "param", "code"}
    assert told["message"] == "x"
