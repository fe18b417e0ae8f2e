"""Sessions share one pass over the LM head."""

from pathlib import Path

import pytest
import torch
from petals.inference import head
from petals.inference.checkpoint import open_checkpoint
from petals.inference.head import Head
from petals.inference.model import Ends
from petals.protocol.errors import LocalProtocolError
from support.tiny_bloom import save_bloom


@pytest.fixture
def ends(tmp_path: Path) -> Ends:
    return open_checkpoint(save_bloom(tmp_path)).load_ends()


@pytest.fixture
def passes(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every pass."""
    counted: list[int] = []
    logits = ends.logits

    def counting(hidden: torch.Tensor, *, largest_only: bool = False) -> torch.Tensor:
        counted.append(len(hidden))
        return logits(hidden, largest_only=largest_only)

    monkeypatch.setattr(ends, "logits", counting)
    return counted


def test_rows_that_wait_are_computed_together(ends: Ends, passes: list[int]) -> None:
    shared = Head(ends)
    hidden = [torch.randn(batch, 1, 48) for batch in (1, 3, 1)]
    waiting = [shared.add(rows) for rows in hidden]
    for rows, own in zip(reversed(waiting), reversed(hidden), strict=True):
        torch.testing.assert_close(rows.logits(), ends.logits(own))
    assert passes[0] == 5 and len(passes) == 1 + len(hidden)  # the others are this test's own


def test_a_pass_is_bounded(ends: Ends, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_MAX_ROWS", 4)
    shared = Head(ends)
    waiting = [shared.add(torch.randn(batch, 1, 48)) for batch in (3, 2, 1, 6)]
    assert [len(rows.logits()) for rows in waiting] == [3, 2, 1, 6]
    assert passes == [4, 2, 6]


@pytest.mark.parametrize("bad_first", [True, False])
def test_rows_of_a_wrong_width_harm_nobody_else(ends: Ends, bad_first: bool) -> None:
    shared = Head(ends)
    bad, good = shared.add(torch.randn(1, 1, 7)), shared.add(torch.randn(1, 1, 48))
    for rows in (bad, good) if bad_first else (good, bad):
        if rows is good:
            assert rows.logits().shape[0] == 1
        else:
            with pytest.raises(LocalProtocolError):
                rows.logits()


@pytest.mark.parametrize("others_too", [True, False])
def test_logits_are_whole_if_anybody_wants_them_whole(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, *, others_too: bool
) -> None:
    wanted: list[bool] = []
    logits = ends.logits

    def watching(hidden: torch.Tensor, *, largest_only: bool) -> torch.Tensor:
        wanted.append(largest_only)
        return logits(hidden, largest_only=largest_only)

    monkeypatch.setattr(ends, "logits", watching)
    shared = Head(ends)
    rows = shared.add(torch.randn(1, 1, 48), largest_only=True)
    shared.add(torch.randn(1, 1, 48), largest_only=not others_too)
    rows.logits()
    assert wanted == [not others_too]
