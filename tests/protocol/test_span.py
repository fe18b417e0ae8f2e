from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.protocol.span import Span, coverage, gaps

BLOCKS = 8


@st.composite
def spans(draw: st.DrawFn, end: int = BLOCKS) -> Span:
    start = draw(st.integers(0, end - 1))
    return Span(start, draw(st.integers(start + 1, end)))


@pytest.mark.parametrize(("start", "end"), [(0, 0), (3, 2), (-1, 2)])
def test_a_span_is_never_empty_or_negative(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="0 <= start < end"):
        Span(start, end)


def test_a_span_reads_and_writes_as_on_the_command_line() -> None:
    assert Span.parse(" 3 : 5 ") == Span(3, 5)
    assert str(Span(3, 5)) == "3:5"
    assert len(Span(3, 5)) == 2


@pytest.mark.parametrize("text", ["", "3", "3:", "3-5", "a:b", "3:5:7", "-1:2", "1:9999999999"])
def test_what_is_no_span_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="write START:END"):
        Span.parse(text)


@given(spans(), spans())
def test_span_algebra_is_that_of_sets(one: Span, other: Span) -> None:
    ones, others = set(range(one.start, one.end)), set(range(other.start, other.end))
    common = one.intersection(other)
    assert (set(range(common.start, common.end)) if common else set()) == ones & others
    assert one.covers(other) == (ones >= others)
    assert {block for block in range(BLOCKS) if block in one} == ones


@given(st.lists(spans(end=12), max_size=6))
def test_coverage_and_gaps_equal_counting(held: list[Span]) -> None:
    counts = [sum(block in span for span in held) for block in range(BLOCKS)]
    assert coverage(held, BLOCKS) == counts
    missing = gaps(held, BLOCKS)
    assert [block for gap in missing for block in range(gap.start, gap.end)] == [
        block for block in range(BLOCKS) if counts[block] == 0
    ]
    assert all(one.end < other.start for one, other in pairwise(missing))
