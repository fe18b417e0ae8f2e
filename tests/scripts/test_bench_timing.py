"""Contestants take turns."""

import threading
from unittest.mock import patch

import pytest
from bench_parts.bandwidth import Bandwidth
from bench_parts.timing import Heartbeat, interleaved, medians, timed


def test_contestants_take_turns_after_a_first_go_that_does_not_count() -> None:
    order: list[str] = []

    def sample(name: str) -> float:
        order.append(name)
        return float(len(order))

    taken = interleaved({"A": lambda: sample("A"), "B": lambda: sample("B")}, rounds=3)
    assert "".join(order) == "ABABABAB"
    assert taken == {"A": [3, 5, 7], "B": [4, 6, 8]}


def test_the_median_is_what_counts() -> None:
    figures = iter([99.0, 3.0, 1.0, 50.0])
    assert medians({"A": lambda: next(figures)}, rounds=3) == {"A": 3.0}


@pytest.mark.parametrize("repeats", [1, 4])
def test_an_action_is_timed_as_often_as_asked(repeats: int) -> None:
    calls: list[None] = []
    assert timed(lambda: calls.append(None), repeats) >= 0
    assert len(calls) == repeats


def test_the_memory_takes_turns_with_what_is_held_against_it() -> None:
    bandwidth = Bandwidth(megabytes=1)
    taken, speeds = bandwidth.beside({"ours": lambda: 2.0}, rounds=2)
    assert taken == {"ours": 2.0}
    assert 0 < speeds["ours"] <= bandwidth.best


def test_the_share_of_a_bound_outlasts_a_memory_that_changes() -> None:
    calls: list[None] = []
    bandwidth = Bandwidth(megabytes=1)

    def speed() -> float:
        return 1.0 if len(calls) < 3 else 2.0

    def reads_ten_bytes() -> float:
        seconds = 10 / speed()
        calls.append(None)
        return seconds

    with patch.object(bandwidth, "measure", speed):
        taken, speeds = bandwidth.beside({"ours": reads_ten_bytes}, rounds=5)
    assert taken["ours"] * speeds["ours"] == 10.0


def test_a_heartbeat_is_heard_and_ends_with_its_block() -> None:
    before = threading.active_count()
    with Heartbeat(interval=0.001) as heartbeat:
        while heartbeat.longest == 0:
            threading.Event().wait(0.001)
    assert heartbeat.longest > 0
    assert threading.active_count() == before
