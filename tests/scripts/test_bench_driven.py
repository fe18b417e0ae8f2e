"""Sessions that decode by themselves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_parts.driven import Driven, gaps, rates, typical_gap
from bench_parts.local import FLOAT32, Local
from bench_parts.models import TINY_BLOCK, model_folder
from bench_parts.sessions import chosen, spread
from petals.protocol.errors import LocalProtocolError
from petals.protocol.span import Span


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    with Local(model_folder(TINY_BLOCK, tmp_path), FLOAT32, span=Span(0, 1)) as local:
        yield local


def test_each_session_has_its_tokens_and_its_length_back(local: Local) -> None:
    sessions = [local.open(200) for _ in range(3)]
    for session in sessions:
        session.fill(10)
    each = rates(sessions, 5)
    assert len(each) == 3 and all(rate > 0 for rate in each)
    assert [session.length for session in sessions] == [10, 10, 10]


def test_they_go_on_until_they_are_stopped(local: Local) -> None:
    sessions = [local.open(4000) for _ in range(2)]
    driven = Driven(sessions)
    driven.start()
    driven.wait_until_each_has(4)
    driven.stop()
    driven.wait()
    assert min(map(len, driven.times)) >= 4
    assert local.engine.statistics().queued == 0


def test_what_made_one_fail_is_raised(local: Local) -> None:
    driven = Driven([local.open(4)], tokens=100)
    driven.start()
    with pytest.raises(LocalProtocolError, match="5 tokens"):
        driven.wait()


def test_gaps_are_between_tokens() -> None:
    assert gaps([1.0, 2.0, 4.0, 9.0], since=3.0) == [2.0, 5.0]
    assert typical_gap([[1.0, 2.0, 3.0, 9.0], [1.0, 2.5, 4.0]], until=3.5) == 1.0


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_few_sessions_have_contexts_as_long_as_many(local: Local, count: int) -> None:
    opened = []
    for length in spread(16, 160):
        opened.append(local.open(300))
        opened[-1].length = length
    lengths = [session.length for session in chosen(opened, count)]
    assert len(lengths) == count
    assert sum(lengths) / count == pytest.approx(80, abs=6)
