"""The demo's own parts; the whole of it is run in tests/swarm."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.node.cli import demo
from petals.protocol.errors import ConfigError


@given(
    text=st.text("a{}\n\"'é ", max_size=30).map(lambda text: text + "\n"),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_text_and_result_come_apart_however_they_arrive(text: str, cuts: list[int]) -> None:
    output = text + '{"text": "x"}\n'
    bounds = [0, *sorted(min(cut, len(output)) for cut in cuts), len(output)]
    splitter = demo.TextThenResult()
    shown = "".join(splitter.feed(output[start:end]) for start, end in pairwise(bounds))
    assert shown == text
    assert splitter.result() == {"text": "x"}


def test_text_is_shown_at_once() -> None:
    splitter = demo.TextThenResult()
    assert splitter.feed("In the") == "In the"
    assert splitter.feed(" beginning") == " beginning"
    assert splitter.feed("\n{") == "\n"
    assert splitter.feed("not json\n") == ""
    assert splitter.feed("so") == "{not json\nso"


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "nodes", "complaint"),
    [("", 1, 1, "--prompt"), ("x", 0, 1, "--max-new-tokens: 0"), ("x", 1, 0, "--nodes: 0")],
)
def test_plans_that_cannot_be(prompt: str, max_new_tokens: int, nodes: int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        demo.Plan(prompt, max_new_tokens, nodes, "demo")


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([1, 2, 3], [1, 2, 3], "the same, token for token (3 tokens)"),
        ([1, 2, 3], [1, 5, 3], "DIFFERS from token 2"),
        ([1, 2], [1, 2, 3], "DIFFERS from token 3"),
    ],
)
def test_comparison(
    capsys: pytest.CaptureFixture[str], ours: list[int], theirs: list[int], said: str
) -> None:
    same = demo.compare({"token_ids": ours}, {"token_ids": theirs, "text": "reference"})
    assert same is (ours == theirs)
    assert said in capsys.readouterr().out


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert demo.threads_each(3) == 5
    assert demo.threads_each(99) == 1
