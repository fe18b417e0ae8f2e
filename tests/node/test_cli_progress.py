"""Bars: what they say, and that they are drawn for people only."""

import io
import sys

import pytest
import trio
from petals.inference.progress import Step
from petals.node.cli import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("amounts", "words"),
    [
        ((3, 8, 0.5, "blocks"), "3 of 8 blocks, 0.5/s"),
        ((3, 8, None, "blocks"), "3 of 8 blocks"),
        ((384, 1024, 127.96, "tokens"), "384 of 1024 tokens, 128.0/s"),
        ((1.5e9, 3e9, 2e7, "bytes"), "1.5 of 3.0 GB, 20.0 MB/s"),
        ((1.5e6, 3e8, 2e7, "bytes"), "1.5 of 300.0 MB, 20.0 MB/s"),
        ((1.5e6, None, None, "bytes"), "1.5 MB"),
        ((0, None, None, ""), ""),
    ],
)
def test_how_far_and_how_fast(
    amounts: tuple[float, float | None, float | None, str], words: str
) -> None:
    assert progress.amounts(*amounts) == words


def test_nothing_is_drawn_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.shown() as tell:
        assert tell is None


def test_a_bar_is_drawn_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    with progress.shown() as tell:
        assert tell is not None
        tell(Step("loading blocks 0:8", 2, 8, "blocks"))
        tell(Step("loading blocks 0:8", 4, 8, "blocks"))
        sys.stderr.write("said meanwhile\n")
    drawn = terminal.getvalue()
    assert "loading blocks 0:8" in drawn
    assert "4 of 8 blocks" in drawn
    assert "said meanwhile" in drawn
    assert drawn.endswith("\x1b[2K"), "the bar's line is cleared"
    tell(Step("loading blocks 0:8", 8, 8, "blocks"))
    assert terminal.getvalue() == drawn, "nothing behind the end"


def test_what_is_done_at_once_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    with progress.shown() as tell:
        assert tell is not None
        tell(Step("opening demo"))
    assert terminal.getvalue() == ""


async def test_a_look_is_taken_until_something_else_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.0)
    monkeypatch.setattr(progress, "LOOK_INTERVAL", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    sent = 0
    looked = trio.Event()

    def look() -> Step:
        nonlocal sent
        sent += 128
        if sent >= 512:
            looked.set()
        return Step("reading the prompt", min(sent, 1024), 1024, "tokens")

    async with progress.watching(look) as end:
        await looked.wait()
        end()
        drawn = terminal.getvalue()
        for _ in range(5):
            await trio.lowlevel.checkpoint()
        assert terminal.getvalue() == drawn
    assert "reading the prompt" in drawn
