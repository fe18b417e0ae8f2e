"""Pieces of text add up to the whole, and end before a stop string."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.inference.detokenizer import Detokenizer
from petals.protocol.errors import ModelError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "hello world, in the beginning there was ä ö ü, 漢字, 😀 and 👩‍👩‍👧"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as BLOOM's: characters outside of ASCII are several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")


def pieces(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer(), stop=stop)
    parts = [detokenizer.add(token) for token in ids]
    parts.append(detokenizer.finish())
    return parts, detokenizer


def ids_of(*tokens: str) -> list[int]:
    vocabulary = tokenizer().get_vocab()
    return [vocabulary[token] for token in tokens]


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The dumb twin: grow the text by one character until it contains a stop string."""
    for end in range(len(text) + 1):
        ends = [end - len(one) for one in stop if text[:end].endswith(one)]
        if ends:
            return text[: min(ends)]
    return text


@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_pieces_add_up_for_any_tokens(ids: list[int]) -> None:
    parts, detokenizer = pieces(ids)
    assert "".join(parts) == tokenizer().decode(ids, skip_special_tokens=True)
    assert detokenizer.text == "".join(parts)
    assert not detokenizer.stopped


@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_text_ends_before_the_first_stop(text: str, stop: tuple[str, ...]) -> None:
    ids = tokenizer().encode(text)
    parts, detokenizer = pieces(ids, stop)
    assert "".join(parts) == cut(text, stop)
    assert detokenizer.stopped == any(one in text for one in stop)


def test_text_streams_and_holds_back_only_what_may_be_a_stop() -> None:
    parts, _ = pieces(ids_of(*"xaabay"), ("abab",))
    assert parts == ["x", "", "a", "", "", "abay", ""]


def test_a_character_of_several_tokens_comes_whole() -> None:
    ids = tokenizer().encode("é")
    parts, _ = pieces(ids)
    assert [part for part in parts if part] == ["é"]


def test_an_unfinished_character_comes_at_the_end() -> None:
    parts, _ = pieces(ids_of("x", "Ã"))
    assert parts == ["x", "", "\ufffd"]


def test_nothing_follows_a_stop() -> None:
    detokenizer = Detokenizer(tokenizer(), stop=("b",))
    ids = tokenizer().encode("abc")
    assert "".join(detokenizer.add(token) for token in ids) == "a"
    assert (detokenizer.add(ids[0]), detokenizer.finish(), detokenizer.text) == ("", "", "a")


def test_special_tokens_are_not_text() -> None:
    parts, _ = pieces([1, *tokenizer().encode("a"), 1])
    assert "".join(parts) == "a"


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is needed"):
        Detokenizer(object())  # type: ignore[arg-type]
