"""The two endpoints that generate: a request becomes a session of this node, and its texts an answer.

A client that hangs up ends its session at every hop, and so does whatever else ends the task of its
request: the session lives as long as that. Nothing is answered before the first token is there, so that
what cannot be is told by the status; what goes wrong later ends the stream with an error.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar

import trio
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ...protocol.errors import PetalsError
from ..conversation import encode_conversation
from ..generation import Generation, GenerationHandle
from ..node import Node, wall_clock
from ..originate import Originator
from ..wakeup import open_flat_nursery
from . import sse
from .errors import ApiError, of_petals
from .metrics import Metrics
from .requests import MAX_TEXTS, ChatRequest, CompletionRequest, GenerationRequest, parse
from .shapes import JSON, Reader, Shape, finish_reason, usage

BODY_TIMEOUT = 60.0
"""Seconds for a client to send its request."""
_DONE = b"data: [DONE]\n\n"

R = TypeVar("R", bound=GenerationRequest)


class Generating(Generic[R]):
    """An ASGI application for one endpoint."""

    def __init__(
        self,
        node: Node,
        metrics: Metrics,
        kind: type[R],
        shape: Shape,
        *,
        max_body: int,
        encoding: trio.CapacityLimiter,
    ) -> None:
        """``encoding``: one for all endpoints, since one thread at a time may use the tokenizer."""
        self._node = node
        self._metrics = metrics
        self._kind = kind
        self._shape = shape
        self._max_body = max_body
        self._encoding = encoding

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError as long as nothing was answered."""
        asked = parse(self._kind, await read_body(receive, self._max_body))
        check_model(self._node, asked.model)
        async with open_flat_nursery() as nursery:
            nursery.start_soon(sse.cancel_at_hangup, receive, nursery.cancel_scope)
            try:
                await self._generate(asked, scope, receive, send)
            except PetalsError as error:
                raise of_petals(error) from error
            nursery.cancel_scope.cancel()

    async def _generate(self, asked: R, scope: Scope, receive: Receive, send: Send) -> None:
        originator = await self._node.originator()
        prompts = await trio.to_thread.run_sync(_encode, originator, asked, limiter=self._encoding)
        if len(prompts) * asked.n > MAX_TEXTS:
            raise ApiError(400, f"n: at most {MAX_TEXTS} texts in one request", param="n")
        params = asked.sampling(_new_tokens(originator, asked, max(map(len, prompts))))
        handle = await self._node.submit(
            [prompt for prompt in prompts for _ in range(asked.n)], params
        )
        prompt_tokens = sum(map(len, prompts))
        try:
            answer = _Answer(originator, handle, asked, self._shape, prompts)
            await handle.more(0)
            if handle.status().error is not None:
                await handle.results()  # raises it
            if asked.stream:
                await answer.stream(send)
            else:
                await JSONResponse(await answer.whole())(scope, receive, send)
        finally:
            handle.cancel()
            self._metrics.ended(handle, prompt_tokens)


class _Answer:
    """What a generation is told as."""

    def __init__(
        self,
        originator: Originator,
        handle: GenerationHandle,
        asked: GenerationRequest,
        shape: Shape,
        prompts: list[list[int]],
    ) -> None:
        self._handle = handle
        self._shape = shape
        self._prompt_tokens = sum(map(len, prompts))
        self._include_usage = asked.include_usage
        before = [echo for echo in _echoes(originator, asked, prompts) for _ in range(asked.n)]
        logprobs = asked.kept_logprobs is not None
        self._readers = [
            Reader(index, originator.tokenizer, logprobs=logprobs, before=echo)
            for index, echo in enumerate(before)
        ]
        self._head = {
            "id": shape.prefix + handle.id,
            "created": int(wall_clock()),
            "model": asked.model,
            "system_fingerprint": f"fp_{originator.checkpoint.fingerprint[:10]}",
        }

    async def whole(self) -> JSON:
        """When all has been generated. Raises what made it fail."""
        generations = await self._handle.results()
        return {
            **self._head,
            "object": self._shape.kind,
            "choices": [
                self._shape.whole(reader.read(generation), finish_reason(generation))
                for reader, generation in zip(self._readers, generations, strict=True)
            ],
            "usage": usage(self._prompt_tokens, generations),
        }

    async def stream(self, send: Send) -> None:
        """As it comes, in server-sent events."""
        await sse.start(send)
        begun = [self._shape.begin(index) for index in range(len(self._readers))]
        await self._send(send, [self._chunk(choice) for choice in begun if choice is not None])
        while True:
            status, generations = self._handle.status(), self._handle.partial()
            await self._send(send, list(self._news(generations)))
            if status.state.final:
                break
            await self._handle.more(status.tokens)
        try:
            generations = await self._handle.results()
        except PetalsError as error:
            await self._send(send, [of_petals(error).body()])
        else:
            await self._send(send, list(self._ends(generations)))
            await sse.send_events(send, [_DONE])
        await sse.end(send)

    def _news(self, generations: list[Generation]) -> Iterator[JSON]:
        for reader, generation in zip(self._readers, generations, strict=True):
            piece = reader.read(generation)
            if piece.text or piece.tokens:
                yield self._chunk(self._shape.piece(piece))

    def _ends(self, generations: list[Generation]) -> Iterator[JSON]:
        for index, generation in enumerate(generations):
            yield self._chunk(self._shape.end(index, finish_reason(generation)))
        if self._include_usage:
            used = usage(self._prompt_tokens, generations)
            yield self._chunk() | {"usage": used}

    def _chunk(self, *choices: JSON) -> JSON:
        chunk: JSON = {**self._head, "object": self._shape.chunk_kind, "choices": list(choices)}
        return chunk | {"usage": None} if self._include_usage else chunk

    async def _send(self, send: Send, events: list[JSON]) -> None:
        await sse.send_events(send, map(sse.event, events))


async def read_body(receive: Receive, limit: int) -> bytes:
    """The whole body of a request. Raises ApiError when it is too large, or takes too long."""
    body = bytearray()
    size = 0
    with trio.move_on_after(BODY_TIMEOUT):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client hung up")
            piece = message.get("body", b"")
            size += len(piece)
            if size <= limit:  # what is too large is read to its end: who still sends hears nothing
                body += piece
            if message.get("more_body", False):
                continue
            if size > limit:
                raise ApiError(
                    413,
                    f"the request has {size} bytes; at most {limit} are taken",
                    code="too_large",
                )
            return bytes(body)
    raise ApiError(408, f"the request was not there within {BODY_TIMEOUT:g} s")


def check_model(node: Node, name: str) -> None:
    """Raise ApiError if this node generates with another model."""
    if name not in (node.model_name, node.config.model):
        raise ApiError(
            404,
            f"model: there is no model {name!r} here; ask for {node.model_name!r}",
            param="model",
            code="model_not_found",
        )


def _encode(originator: Originator, asked: GenerationRequest) -> list[list[int]]:
    """On a thread of its own: token ids of each prompt."""
    tokenizer = originator.tokenizer
    if isinstance(asked, ChatRequest):
        messages = [message.model_dump() for message in asked.messages]
        encoded = [encode_conversation(tokenizer, messages)]
    else:
        assert isinstance(asked, CompletionRequest)
        encoded = [
            list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
            for prompt in asked.prompt
        ]
    if not all(encoded):
        raise ApiError(400, "the prompt must not be empty; write at least one word")
    return encoded


def _echoes(
    originator: Originator, asked: GenerationRequest, prompts: list[list[int]]
) -> list[str]:
    """What the client wants in front of the texts of each prompt."""
    if not isinstance(asked, CompletionRequest) or not asked.echo:
        return [""] * len(prompts)
    return [
        said if isinstance(said, str) else str(originator.tokenizer.decode(said))
        for said in asked.prompt
    ]


def _new_tokens(originator: Originator, asked: GenerationRequest, prompt_tokens: int) -> int:
    """How many tokens at most. Raises ApiError when the model was not made for so many."""
    wanted, said = asked.wanted_tokens()
    most = originator.checkpoint.max_length
    room = most - prompt_tokens
    if room < 1 or (said and wanted > room):
        raise ApiError(
            400,
            f"the model takes at most {most} tokens, and this asks for {prompt_tokens + wanted} "
            f"({prompt_tokens} in the prompt, {wanted} new ones); shorten one of the two",
            code="context_length_exceeded",
        )
    return min(wanted, room)
