"""Turns of a conversation as token ids, with the marks that a model was trained to see around them.

A session only ever grows, so a turn is what comes between an answer and the next one: found by
having the template write a conversation whose answer is a word that we know again. Nothing has to
be remembered of what was said before, which a session from a file would not have.
"""

from collections.abc import Collection, Sequence
from typing import Any

_ANSWER = "7c1e0f-answer"
"""Text that no template and no person writes."""


def plain_turn(text: str) -> str:
    """What is said to a model without a template: the text as it is, with a line break behind it."""
    return text + "\n"


class ChatTemplate:
    """The template of a tokenizer, or line breaks where it has none."""

    def __init__(self, tokenizer: Any, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)

    def turn(self, text: str, before: Sequence[int]) -> list[int]:
        """What a user's ``text`` adds to a conversation whose token ids so far are ``before``."""
        if not self._tokenizer.chat_template:
            token_ids: list[int] = self._tokenizer(plain_turn(text))["input_ids"]
            return token_ids
        said = {"role": "user", "content": text}
        if not before:
            return self._encoded(self._written([said]))
        answer = {"role": "assistant", "content": _ANSWER}
        written = self._written([{"role": "user", "content": "?"}, answer, said])
        token_ids = self._encoded(written.rpartition(_ANSWER)[2])
        # An answer that came to its end has brought the mark of it along.
        return token_ids[1:] if before[-1] in self._eos and token_ids[0] in self._eos else token_ids

    def _written(self, messages: list[dict[str, str]]) -> str:
        written: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return written

    def _encoded(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return token_ids
