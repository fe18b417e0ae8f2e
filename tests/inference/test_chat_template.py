"""Turns of a conversation, in the marks of a model that has some."""

import pytest
from petals.inference.chat_template import ChatTemplate
from support.tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

MARKED = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ':' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>", bos_token="<s>"
    )


def test_without_a_template_a_line_is_a_line(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer, [1])
    assert template.turn("hello", []) == tokenizer("hello\n")["input_ids"]
    assert template.turn("world", [5, 1]) == tokenizer("world\n")["input_ids"]


def test_turns_give_what_the_template_makes_of_the_whole(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = MARKED
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    template = ChatTemplate(tokenizer, [eos])
    answer = tokenizer("in the beginning", add_special_tokens=False)["input_ids"]
    for ended in (True, False):  # an answer that is cut off at its longest has no end of its own
        before = template.turn("hello", []) + answer + [eos] * ended
        whole = before + template.turn("world", before)
        messages = [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "in the beginning"},
            {"role": "user", "content": "world"},
        ]
        written = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(whole) == written
