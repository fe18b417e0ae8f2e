"""Which faults a seed brings, and whom they may hit."""

import math

from chaos_parts.schedule import PAUSES, RANGES, Kind, may_be_hurt, schedule
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(0, 2**32), st.floats(1, 600))
def test_a_seed_always_brings_the_same_faults(seed: int, seconds: float) -> None:
    faults = schedule(seed, seconds)
    assert faults == schedule(seed, seconds)
    assert faults == [fault for fault in schedule(seed, 2 * seconds) if fault.at < seconds]


@given(st.integers(0, 2**32))
def test_faults_come_in_order_and_last_as_long_as_their_kind_does(seed: int) -> None:
    faults = schedule(seed, 300)
    before = 0.0
    for fault in faults:
        assert PAUSES[0] <= fault.at - before <= PAUSES[1]
        least, most = RANGES.get(fault.kind, (0.0, 0.0))
        assert least <= fault.seconds <= most
        assert (fault.delay > 0) is (fault.kind is Kind.DELAY)
        assert (fault.rate < math.inf) is (fault.kind is Kind.NARROW)
        before = fault.at


spans = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.sampled_from("xyz"))


@given(spans, st.data())
def test_every_span_stays_served_whoever_is_hurt(
    spans: dict[str, str], data: st.DataObject
) -> None:
    whole = data.draw(
        st.lists(st.sampled_from(sorted(spans)), unique=True) if spans else st.just([])
    )
    for name in may_be_hurt(spans, whole):
        left = [other for other in whole if other != name]
        assert {spans[other] for other in left} == {spans[other] for other in whole}


def test_a_node_is_hurt_only_while_another_is_whole() -> None:
    spans = {"a": "0:3", "b": "0:3", "c": "3:6"}
    assert may_be_hurt(spans, ["a", "b", "c"]) == ["a", "b"]
    assert may_be_hurt(spans, ["a", "c"]) == []
