"""A conversation becomes the prompt that the model's own template makes of it."""

import copy

import pytest
from petals.inference.chat_template import plain_turn
from petals.node.conversation import encode_conversation
from petals.protocol.errors import ConfigError
from support.tiny_tokenizer import tiny_tokenizer

MESSAGES = [
    {"role": "system", "content": "hello"},
    {"role": "user", "content": "in the beginning"},
]
TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ raise_exception('no answers, please') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
)


def test_without_a_template_every_message_is_a_line() -> None:
    tokenizer = tiny_tokenizer()
    plain = plain_turn("hello") + plain_turn("in the beginning")
    assert plain == "hello\nin the beginning\n"
    assert encode_conversation(tokenizer, MESSAGES) == tokenizer(plain)["input_ids"]


def test_the_models_own_template() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    token_ids = encode_conversation(tokenizer, MESSAGES)
    assert tokenizer.decode(token_ids) == "<s>[system] hello[user] in the beginning[answer]"
    assert token_ids.count(tokenizer.bos_token_id) == 1


def test_what_a_template_has_no_place_for() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ConfigError, match="template refuses them: no answers, please"):
        encode_conversation(tokenizer, [{"role": "assistant", "content": "hello"}])
