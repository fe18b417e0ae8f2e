"""What the API answers when something cannot be, in the words and classes of the ``openai`` client."""

import contextlib
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import openai
import pytest
import trio
from openai import OpenAI
from support.apis import (
    LONG,
    MESSAGES,
    MOST_REQUESTS,
    PAGE,
    Served,
    in_thread,
    raw,
    serving_apis,
    start_api,
)
from support.processes import ProcessSwarm
from support.reference import ReferenceModel


@pytest.fixture(scope="module")
def served(
    random_bloom: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serving_apis(random_bloom, tmp_path_factory.mktemp("swarm"), "0:3", "3:6", "6:8") as apis:
        yield apis


WRONG: dict[str, tuple[type[openai.APIStatusError], int, str | None, str, dict[str, Any]]] = {
    "another model": (openai.NotFoundError, 404, "model_not_found", "model", {"model": "gpt-7"}),
    "too many tokens": (
        openai.BadRequestError,
        400,
        "context_length_exceeded",
        "at most 700 tokens",
        {"max_tokens": 700},
    ),
    "too long a prompt": (
        openai.BadRequestError,
        400,
        "context_length_exceeded",
        "shorten",
        {"prompt": "word " * 800},
    ),
    "no text": (openai.BadRequestError, 400, None, "must not be empty", {"prompt": ""}),
    "unknown tokens": (openai.BadRequestError, 400, None, "token ids", {"prompt": [1, 1 << 40]}),
    "too many texts": (openai.BadRequestError, 400, None, "at most 64", {"prompt": ["a"] * 65}),
    "no tokens": (openai.BadRequestError, 400, None, "max_tokens: ", {"max_tokens": 0}),
    "not done here": (
        openai.BadRequestError,
        400,
        "unsupported_parameter",
        "echo: is not supported together with logprobs",
        {"echo": True, "logprobs": 1},
    ),
    "too large": (openai.APIStatusError, 413, "too_large", "bytes", {"prompt": "x" * (3 << 20)}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", WRONG)
async def test_what_cannot_be_is_told(served: Served, name: str, stream: bool) -> None:
    kind, status, code, words, fields = WRONG[name]
    asked = {"model": served.name, "prompt": "And", "stream": stream, **fields}
    with pytest.raises(kind) as caught:
        await in_thread(lambda: served.client().completions.create(**asked))
    error = caught.value
    assert (error.status_code, error.code) == (status, code)
    assert words in error.message
    assert error.type == "invalid_request_error"


WRONG_CHATS: dict[str, tuple[str | None, str, dict[str, Any]]] = {
    "nothing said": (None, "messages: ", {"messages": []}),
    "an unknown role": (
        None,
        "messages[0].role: ",
        {"messages": [{"role": "cat", "content": "m"}]},
    ),
    "a picture": (
        None,
        "messages[0].content: ",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ),
    "too hot": (None, "temperature: ", {"temperature": 5}),
    "more than all": (None, "top_p: ", {"top_p": 2}),
    "no texts": (None, "n: ", {"n": 0}),
    "a large penalty": (None, "presence_penalty: ", {"presence_penalty": 3}),
    "too many stops": (None, "stop: ", {"stop": list("abcde")}),
    "a bad seed": (None, "seed: ", {"seed": "x"}),
    "too many log probabilities": (None, "top_logprobs: ", {"logprobs": True, "top_logprobs": 99}),
    "log probabilities of nothing": (None, "needs logprobs", {"top_logprobs": 2}),
    "usage without a stream": (
        None,
        "stream_options: ",
        {"stream": False, "stream_options": {"include_usage": True}},
    ),
    "a tool": (
        "unsupported_parameter",
        "tools: is not supported",
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
    ),
    "another form": (
        "unsupported_parameter",
        "response_format: is not supported",
        {"response_format": {"type": "json_object"}},
    ),
    "too many tokens": (
        "context_length_exceeded",
        "shorten",
        {"max_completion_tokens": 700},
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", WRONG_CHATS)
async def test_what_cannot_be_said_in_a_chat_is_told(
    served: Served, name: str, stream: bool
) -> None:
    code, words, fields = WRONG_CHATS[name]
    asked = {"model": served.name, "messages": MESSAGES, "stream": stream, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        await in_thread(lambda: served.client().chat.completions.create(**asked))
    assert words in caught.value.message
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"


async def test_what_is_not_there_is_told(served: Served) -> None:
    client = served.client()
    for ask in (
        lambda: client.models.retrieve("gpt-7"),
        lambda: client.embeddings.create(model=served.name, input="And"),
        lambda: client.chat.completions.create(model="gpt-7", messages=MESSAGES),
    ):
        with pytest.raises(openai.NotFoundError):
            await in_thread(ask)


async def test_a_wrong_key(served: Served) -> None:
    for ask in (
        served.client(api_key="another").models.list,
        lambda: served.client(api_key="another").completions.create(model="m", prompt="p"),
    ):
        with pytest.raises(openai.AuthenticationError) as caught:
            await in_thread(ask)
        assert caught.value.code == "invalid_api_key"


async def test_more_requests_than_are_taken(served: Served) -> None:
    def fill() -> None:
        client = served.client()
        with contextlib.ExitStack() as stack:
            for _ in range(MOST_REQUESTS):
                stream = client.completions.create(model=served.name, stream=True, **LONG)
                next(iter(stack.enter_context(stream)))
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model=served.name, prompt="And")
            assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
            assert caught.value.response.headers["retry-after"] == "1"

    await in_thread(fill)


async def test_what_is_no_request(served: Served) -> None:
    at = served.open_url + "/completions"
    as_json = {"Content-Type": "application/json"}
    good = {"model": served.name, "prompt": "And", "max_tokens": 1}
    for status, answer in [
        (200, partial(raw, at, json=good)),
        (400, partial(raw, at, content=b"{", headers=as_json)),
        (400, partial(raw, at, data=good)),
        (403, partial(raw, at, json=good, headers={"Host": "rebound.example"})),
        (404, partial(raw, served.open_url + "/embeddings", json=good)),
        (404, partial(raw, served.open_url + "/models/gpt-7", method="GET")),
        (405, partial(raw, at, method="GET")),
    ]:
        response = await in_thread(answer)
        assert response.status_code == status, response.text
        if status != 200:
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}


async def test_whatever_is_sent_the_node_goes_on(served: Served) -> None:
    host, port = served.url.removeprefix("http://").removesuffix("/v1").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    body = b"Content-Type: application/json\r\n"
    for sent in (
        b"\0" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        head + b"X: " + b"x" * 100_000,
        head + body + b"Content-Length: 99999999999\r\n\r\n{",
        head + body + b"Transfer-Encoding: chunked\r\n\r\nffffffffffff\r\n",
        head + b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: ?\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    ):
        stream = await trio.open_tcp_stream(host, int(port))
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(sent)
            # a reset, not a good-bye
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await stream.aclose()
    models = await in_thread(lambda: served.client().models.list().data)
    assert [model.id for model in models] == [served.name]


async def test_web_pages_may_ask_only_where_they_are_named(served: Served) -> None:
    def allowed(url: str, origin: str) -> str | None:
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        response = raw(url + "/completions", method="OPTIONS", headers=headers)
        told: str | None = response.headers.get("access-control-allow-origin")
        return told

    for url, origin, told in [
        (served.url, PAGE, PAGE),
        (served.url, "https://other.example", None),
        (served.open_url, PAGE, None),
    ]:
        assert await in_thread(partial(allowed, url, origin)) == told


async def test_health_and_metrics(served: Served) -> None:
    at = served.url.removesuffix("/v1")
    assert (await in_thread(lambda: httpx.get(at + "/health"))).json() == {"status": "ok"}
    assert (await in_thread(lambda: httpx.get(at + "/metrics"))).status_code == 401
    await in_thread(
        lambda: raw(
            served.open_url + "/completions",
            json={"model": served.name, "prompt": [[1, 2, 3]], "max_tokens": 4},
        )
    )
    at = served.open_url.removesuffix("/v1")
    told = (await in_thread(lambda: httpx.get(at + "/metrics"))).text
    for name in (
        "petals_sessions",
        "petals_cache_tokens_used",
        'petals_bytes_sent_total{protocol="/petals/session/1"}',
        'petals_round_rows_bucket{le="+Inf"}',
        "petals_round_seconds_sum",
        "petals_step_queue_seconds_count",
        "petals_api_prompt_tokens_total",
        "petals_api_generated_tokens_total",
        "petals_api_recoveries_total",
        "petals_api_time_to_first_token_seconds_count",
        'petals_api_requests_total{path="/v1/completions",status="200"}',
    ):
        assert f"\n{name} " in told
    assert "# TYPE petals_round_rows histogram" in told


async def test_nodes_without_room(random_bloom: ReferenceModel, tmp_swarm: ProcessSwarm) -> None:
    tmp_swarm.serve(random_bloom.folder, "0:4", "4:8", options=("--cache-tokens", "128"))
    with (
        start_api(tmp_swarm, random_bloom, "--patience", "0.5") as api,
        OpenAI(base_url=api.event("api")["url"], api_key="any", max_retries=0) as client,
    ):
        ask = partial(client.completions.create, model=random_bloom.folder.name, prompt="And")
        with pytest.raises(openai.InternalServerError) as caught:
            await in_thread(lambda: ask(max_tokens=600))
        assert (caught.value.status_code, caught.value.code) == (503, "no_route")
        assert int(caught.value.response.headers["retry-after"]) > 0
        assert (await in_thread(lambda: ask(max_tokens=4))).usage is not None


async def test_blocks_that_nobody_serves(
    random_bloom: ReferenceModel, tmp_swarm: ProcessSwarm
) -> None:
    [node] = tmp_swarm.serve(random_bloom.folder, "0:8")
    name = random_bloom.folder.name
    with (
        start_api(tmp_swarm, random_bloom, "--patience", "0.5") as api,
        OpenAI(base_url=api.event("api")["url"], api_key="any", max_retries=0) as client,
    ):

        def read_until_it_breaks() -> None:
            stream = iter(client.completions.create(model=name, stream=True, **LONG))
            next(stream)
            node.process.kill()
            with pytest.raises(openai.APIError, match="0:8"):
                for _ in stream:
                    pass

        await in_thread(read_until_it_breaks)
        with pytest.raises(openai.InternalServerError) as caught:
            await in_thread(lambda: client.completions.create(model=name, prompt="And"))
        assert (caught.value.status_code, caught.value.code) == (503, "no_route")
        assert "0:8" in caught.value.message
        assert int(caught.value.response.headers["retry-after"]) > 0
