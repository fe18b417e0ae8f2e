"""What a client may ask, checked field by field: the bodies of the two endpoints that generate.

Rules of this file: a field that OpenAI's API has and that would change the text is either done or
refused in words; fields that nobody knows are ignored, as OpenAI does. ``null`` is the default.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from ...inference.sampling_params import MAX_LOGPROBS, SamplingParams
from .errors import ApiError

MAX_TEXTS = 64
"""Texts of one request: they are the sequences of one session."""
MAX_STOPS = 4
DEFAULT_CHAT_TOKENS = 1024
"""Of an answer, where the client does not say: a session reserves room for all of them at each hop."""
_MAX_SEED = 2**63 - 1


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004 - pydantic wants it
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be Unicode text (it has half of a surrogate pair)") from None
    return value


def _texts(value: object) -> tuple[str, ...]:
    texts = tuple(map(_text, value if isinstance(value, list) else [value]))
    if len(texts) > MAX_STOPS or not all(texts):
        raise ValueError(f"must be a string that is not empty, or a list of up to {MAX_STOPS}")
    return texts


def _prompts(value: object) -> list[str | list[int]]:
    if isinstance(value, str):
        return [_text(value)]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return [_text(item) for item in value]
        if _are_tokens(value):
            return [value]
        if all(isinstance(item, list) and _are_tokens(item) for item in value):
            return value
    raise ValueError("must be a string, a list of token ids, or a list of either")


def _are_tokens(value: Sequence[object]) -> bool:
    return bool(value) and all(
        isinstance(item, int) and not isinstance(item, bool) for item in value
    )


def _content(value: object) -> str:
    if not isinstance(value, list):
        return _text(value)
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError('must be a string or a list of {"type": "text", "text": …}')
        texts.append(_text(part.get("text")))
    return "".join(texts)


def _role(value: object) -> str:
    if value == "developer":
        return "system"  # what chat templates call it
    if value in ("system", "user", "assistant"):
        return str(value)
    raise ValueError("must be system, developer, user or assistant; there are no tools here")


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_content)]


class GenerationRequest(BaseModel):
    """What both endpoints know."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
    harmless: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Fields that are not done here, with the values that ask for nothing."""

    model: Annotated[str, BeforeValidator(_text)]
    n: int = Field(1, ge=1, le=MAX_TEXTS)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0)
    """Not OpenAI's; other servers have it, and so does this swarm."""
    repetition_penalty: float = Field(1.0, gt=0, le=1000)
    """Likewise."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-_MAX_SEED - 1, le=_MAX_SEED)
    stop: Annotated[tuple[str, ...], BeforeValidator(_texts)] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _look_at_all(cls, given: object) -> object:
        if not isinstance(given, dict):
            raise ApiError(400, "the body must be a JSON object")
        said = {name: value for name, value in given.items() if value is not None}
        for name, harmless in cls.harmless.items():
            if name in said and said[name] not in harmless:
                raise ApiError(
                    400,
                    f"{name}: is not supported here; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )
        return said

    @model_validator(mode="after")
    def _look_at_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options: is only for a request with stream", param="stream_options"
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream is to end with what was used."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def kept_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell with each one; None: no probabilities at all."""
        raise NotImplementedError

    def wanted_tokens(self) -> tuple[int, bool]:
        """How many new tokens at most, and whether the client has said so."""
        raise NotImplementedError

    def sampling(self, max_new_tokens: int) -> SamplingParams:
        """How to choose them. Raises ConfigError."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            # No more than the likeliest token has no probability at all: what is left is greedy.
            temperature=self.temperature if self.top_p else 0.0,
            top_p=self.top_p or 1.0,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logprobs=self.kept_logprobs,
            seed=None if self.seed is None else self.seed & _MAX_SEED,
            stop=self.stop,
        )


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    harmless: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "best_of": (1,),
        "logit_bias": ({},),
        "suffix": ("",),
    }

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False

    @model_validator(mode="after")
    def _look_at_echo(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise ApiError(
                400,
                "echo: is not supported together with logprobs; leave one of them out",
                param="echo",
                code="unsupported_parameter",
            )
        return self

    @property
    def kept_logprobs(self) -> int | None:
        """As the client says."""
        return self.logprobs

    def wanted_tokens(self) -> tuple[int, bool]:
        """As the client says, or OpenAI's own default."""
        return self.max_tokens, True


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    harmless: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logit_bias": ({},),
        "modalities": (["text"],),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _look_at_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
        return self

    @property
    def kept_logprobs(self) -> int | None:
        """As the client says."""
        return self.top_logprobs if self.logprobs else None

    def wanted_tokens(self) -> tuple[int, bool]:
        """As the client says, by the new name or the old one."""
        said = self.max_completion_tokens or self.max_tokens
        return said or DEFAULT_CHAT_TOKENS, said is not None


Request = TypeVar("Request", bound=GenerationRequest)


def parse(kind: type[Request], body: bytes) -> Request:
    """The request in ``body``. Raises ApiError that says which field is wrong, and how."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = _path(first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{param}: {message}", param=param) from None


def _path(location: Sequence[str | int]) -> str:
    """Where in the body: ``messages[0].content``."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path.removeprefix(".")
