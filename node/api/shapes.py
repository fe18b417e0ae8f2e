"""What a client is told of its texts: the objects of OpenAI's API, whole and in pieces.

Rules of this file: pure functions from what was generated to JSON.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...inference.detokenizer import Detokenizer
from ...inference.sampling_params import TokenLogprobs
from ..generation import Generation

JSON = dict[str, Any]
_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token that a text was made of."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int
    """Where in the text it begins."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What has been added to one text."""

    index: int
    text: str
    tokens: tuple[ShownToken, ...] | None
    """None: nobody asked for them."""


class Reader:
    """Reads one text as it grows."""

    def __init__(self, index: int, tokenizer: Any, *, logprobs: bool, before: str = "") -> None:
        """``before``: what the client wants in front of it."""
        self._index = index
        self._before = before
        self._tokenizer = tokenizer
        self._given = 0
        self._logprobs = logprobs
        self._all = Detokenizer(tokenizer)
        """Says where each token's text begins, stop strings or not."""
        self._seen = 0
        self._waiting: list[ShownToken] = []
        """Tokens whose text has not been given out; those that end the text never are."""

    def read(self, generation: Generation) -> Piece:
        """What is new in it."""
        text = self._before + generation.text[self._given :]
        self._before = ""
        self._given = len(generation.text)
        if not self._logprobs:
            return Piece(self._index, text, None)
        new = slice(self._seen, len(generation.logprobs))
        for token, logprobs in zip(
            generation.token_ids[new], generation.logprobs[new], strict=True
        ):
            self._waiting.append(self._shown(token, logprobs))
        self._seen = new.stop
        given = tuple(token for token in self._waiting if token.offset < self._given)
        del self._waiting[: len(given)]
        return Piece(self._index, text, given)

    def _shown(self, token: int, logprobs: TokenLogprobs) -> ShownToken:
        offset = len(self._all.text)
        self._all.add(token)
        return ShownToken(
            text=self._tokenizer.decode([token]),
            logprob=logprobs.logprob,
            top=tuple((self._tokenizer.decode([other]), value) for other, value in logprobs.top),
            offset=offset,
        )


def finish_reason(generation: Generation) -> str:
    """Why it ended, in OpenAI's words."""
    return _REASONS[generation.finish_reason]


def usage(prompt_tokens: int, generations: Iterable[Generation]) -> JSON:
    """How many tokens went in and came out."""
    completion_tokens = sum(len(generation.token_ids) for generation in generations)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Shape(Protocol):
    """How one endpoint tells it."""

    prefix: str
    """Of the answer's id."""
    kind: str
    chunk_kind: str

    def whole(self, piece: Piece, reason: str) -> JSON:
        """A text that was waited for."""
        ...

    def begin(self, index: int) -> JSON | None:
        """What comes before the first piece of a text, if anything does."""
        ...

    def piece(self, piece: Piece) -> JSON:
        """A piece of a text."""
        ...

    def end(self, index: int, reason: str) -> JSON:
        """What comes behind the last piece."""
        ...


class CompletionShape:
    """``/v1/completions``."""

    prefix = "cmpl-"
    kind = chunk_kind = "text_completion"

    def whole(self, piece: Piece, reason: str) -> JSON:
        """A text that was waited for."""
        return self.piece(piece) | {"finish_reason": reason}

    def begin(self, index: int) -> JSON | None:
        """Nothing."""
        del index
        return None

    def piece(self, piece: Piece) -> JSON:
        """A piece of a text."""
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": None if piece.tokens is None else _completion_logprobs(piece.tokens),
            "finish_reason": None,
        }

    def end(self, index: int, reason: str) -> JSON:
        """What comes behind the last piece."""
        return self.whole(Piece(index, "", None), reason)


class ChatShape:
    """``/v1/chat/completions``."""

    prefix = "chatcmpl-"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def whole(self, piece: Piece, reason: str) -> JSON:
        """An answer that was waited for."""
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": _chat_logprobs(piece.tokens),
            "finish_reason": reason,
        }

    def begin(self, index: int) -> JSON | None:
        """Whose turn it is."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> JSON:
        """A piece of an answer."""
        return self._chunk(piece.index, {"content": piece.text}, _chat_logprobs(piece.tokens))

    def end(self, index: int, reason: str) -> JSON:
        """What comes behind the last piece."""
        return self._chunk(index, {}) | {"finish_reason": reason}

    def _chunk(self, index: int, delta: JSON, logprobs: JSON | None = None) -> JSON:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _completion_logprobs(tokens: Sequence[ShownToken]) -> JSON:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) | {token.text: token.logprob} for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _chat_logprobs(tokens: Sequence[ShownToken] | None) -> JSON | None:
    if tokens is None:
        return None
    return {
        "content": [
            _logprob(token.text, token.logprob)
            | {"top_logprobs": [_logprob(text, value) for text, value in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def _logprob(text: str, value: float) -> JSON:
    # A token may be a part of a character: then it is no text, and its bytes are not known here.
    whole = "\N{REPLACEMENT CHARACTER}" not in text
    return {"token": text, "logprob": value, "bytes": list(text.encode()) if whole else None}
