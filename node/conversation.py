"""How a conversation becomes a prompt: by the model's own template, or plainly for one without."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from ..inference.chat_template import plain_turn
from ..protocol.errors import ConfigError


def encode_conversation(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The token ids of ``messages`` (``role``, ``content``), up to where the model's answer begins.

    Raises ConfigError when the template has no place for them.
    """
    if tokenizer.chat_template is None:
        text = "".join(plain_turn(message["content"]) for message in messages)
        return list(tokenizer(text)["input_ids"])
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ConfigError(f"messages: the model's chat template refuses them: {error}") from error
    # A template writes the special tokens that it wants.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
