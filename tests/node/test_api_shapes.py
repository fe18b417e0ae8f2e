"""What clients are told of a text, whole and as it grows."""

import dataclasses

from petals.inference.sampling_params import TokenLogprobs
from petals.node.api.shapes import ChatShape, CompletionShape, Reader, ShownToken, usage
from petals.node.generation import Generation
from support.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
NOTHING = Generation("", (), (), "length", 0.0, 0.0, (), 0)


def grown(text: str, token_ids: list[int]) -> Generation:
    logprobs = tuple(TokenLogprobs(-0.5 * n, ((7, -0.1),)) for n in range(len(token_ids)))
    return dataclasses.replace(NOTHING, text=text, token_ids=tuple(token_ids), logprobs=logprobs)


def test_pieces_and_their_tokens_add_up() -> None:
    text = "hello 漢, in"
    ids = TOKENIZER(text)["input_ids"]
    reader = Reader(0, TOKENIZER, logprobs=True)
    texts: list[str] = []
    tokens: list[ShownToken] = []
    for count in range(1, len(ids) + 1):
        # as the node gives it: no more than what is certain
        certain = str(TOKENIZER.decode(ids[:count])).rstrip("\N{REPLACEMENT CHARACTER}")
        piece = reader.read(grown(certain, ids[:count]))
        texts.append(piece.text)
        tokens += piece.tokens or ()
    assert "".join(texts) == text
    assert [token.logprob for token in tokens] == [-0.5 * n for n in range(len(ids))]
    assert tokens[0].offset == 0
    assert text[tokens[-1].offset :] == tokens[-1].text


def test_tokens_of_what_was_cut_off_are_not_told() -> None:
    ids = [*TOKENIZER("hello world")["input_ids"], TOKENIZER.eos_token_id]
    whole = Reader(0, TOKENIZER, logprobs=True).read(grown("hello world", ids))
    assert whole.tokens is not None and len(whole.tokens) == len(ids) - 1
    cut = Reader(0, TOKENIZER, logprobs=True).read(grown("hello", ids))
    assert cut.tokens is not None
    assert all(token.offset < len("hello") for token in cut.tokens)
    assert len(cut.tokens) < len(whole.tokens)


def test_nobody_asked_for_tokens() -> None:
    piece = Reader(0, TOKENIZER, logprobs=False).read(grown("hello", [5]))
    assert piece.tokens is None
    assert CompletionShape().whole(piece, "stop") == {
        "index": 0,
        "text": "hello",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert ChatShape().whole(piece, "length") == {
        "index": 0,
        "message": {"role": "assistant", "content": "hello", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }


def test_a_token_that_is_a_part_of_a_character_has_no_bytes() -> None:
    ids = TOKENIZER("漢")["input_ids"]
    piece = Reader(0, TOKENIZER, logprobs=True).read(grown("漢", ids))
    [choice] = [ChatShape().piece(piece)]
    told = choice["logprobs"]["content"]
    assert len(told) == len(ids) > 1
    assert {token["bytes"] for token in told} == {None}


def test_usage_counts_every_text() -> None:
    texts = [grown("a", [1]), grown("b c", [2, 3])]
    assert usage(5, texts) == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
