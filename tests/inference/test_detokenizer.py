"""Pieces of text add up to the whole, and end before a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.inference.detokenizer import Detokenizer
from petals.protocol.errors import ModelError
from support.tiny_tokenizer import tiny_tokenizer


def pieces(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tiny_tokenizer(), stop=stop)
    parts = [detokenizer.add(token) for token in ids]
    parts.append(detokenizer.finish())
    return parts, detokenizer


def ids_of(*tokens: str) -> list[int]:
    vocabulary = tiny_tokenizer().get_vocab()
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
    assert "".join(parts) == tiny_tokenizer().decode(ids, skip_special_tokens=True)
    assert detokenizer.text == "".join(parts)
    assert not detokenizer.stopped


@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_text_ends_before_the_first_stop(text: str, stop: tuple[str, ...]) -> None:
    ids = tiny_tokenizer().encode(text)
    parts, detokenizer = pieces(ids, stop)
    assert "".join(parts) == cut(text, stop)
    assert detokenizer.stopped == any(one in text for one in stop)


def test_text_streams_and_holds_back_only_what_may_be_a_stop() -> None:
    parts, _ = pieces(ids_of(*"xaabay"), ("abab",))
    assert parts == ["x", "", "a", "", "", "abay", ""]


def test_a_character_of_several_tokens_comes_whole() -> None:
    ids = tiny_tokenizer().encode("é")
    parts, _ = pieces(ids)
    assert [part for part in parts if part] == ["é"]


def test_an_unfinished_character_comes_at_the_end() -> None:
    parts, _ = pieces(ids_of("x", "Ã"))
    assert parts == ["x", "", "\ufffd"]


def test_nothing_follows_a_stop() -> None:
    detokenizer = Detokenizer(tiny_tokenizer(), stop=("b",))
    ids = tiny_tokenizer().encode("abc")
    assert "".join(detokenizer.add(token) for token in ids) == "a"
    assert (detokenizer.add(ids[0]), detokenizer.finish(), detokenizer.text) == ("", "", "a")


def test_special_tokens_are_not_text() -> None:
    parts, _ = pieces([1, *tiny_tokenizer().encode("a"), 1])
    assert "".join(parts) == "a"


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is needed"):
        Detokenizer(object())  # type: ignore[arg-type]
