"""How busy nodes are, from what they count."""

import pytest
from petals.node.api.load import Loads


def counted(
    steps: int, busy: float, queued: float = 0.0, rounds: int | None = None
) -> dict[str, float]:
    return {
        "steps": steps,
        "rounds": steps if rounds is None else rounds,
        "busy_seconds": busy,
        "queued_seconds": queued,
        "cache_tokens_total": 100,
    }


def test_one_look_says_nothing_of_speed() -> None:
    loads = Loads()
    told = loads.update({"a": counted(10, 5)}, now=0)
    assert told["a"]["busy"] is None
    assert told["a"]["cache_tokens_total"] == 100
    assert loads.of_a_step("a") == {"wait": None, "compute": None}


def test_two_looks_say_how_busy_and_how_long_a_step_takes() -> None:
    loads = Loads()
    loads.update({"a": counted(10, 5)}, now=0)
    told = loads.update({"a": counted(30, 6, queued=0.4, rounds=20)}, now=2)
    assert told["a"]["busy"] == 0.5
    assert loads.of_a_step("a") == {
        "wait": pytest.approx(0.02),
        "compute": pytest.approx(0.1),
    }


def test_where_nothing_was_computed_the_last_times_hold() -> None:
    loads = Loads()
    loads.update({"a": counted(0, 0)}, now=0)
    loads.update({"a": counted(10, 1)}, now=2)
    told = loads.update({"a": counted(10, 1)}, now=4)
    assert told["a"]["busy"] == 0
    assert loads.of_a_step("a")["compute"] == pytest.approx(0.1)


def test_who_does_not_answer_has_no_load() -> None:
    loads = Loads()
    loads.update({"a": counted(0, 0)}, now=0)
    assert loads.update({"a": None}, now=2) == {"a": None}
    assert loads.update({"a": counted(9, 9)}, now=4)["a"]["busy"] is None


def test_a_count_that_begins_anew_is_no_negative_load() -> None:
    loads = Loads()
    loads.update({"a": counted(1000, 500)}, now=0)
    assert loads.update({"a": counted(5, 1)}, now=2)["a"]["busy"] == 0
    assert loads.of_a_step("a")["compute"] is None


@pytest.mark.parametrize("figures", [{}, {"steps": -5.0}, {"busy_seconds": 1e18}])
def test_strangers_may_count_what_they_like(figures: dict[str, float]) -> None:
    loads = Loads()
    loads.update({"a": counted(0, 0)}, now=0)
    busy = loads.update({"a": figures}, now=2)["a"]["busy"]
    assert busy is None or 0 <= busy <= 1


def test_who_has_gone_is_forgotten() -> None:
    loads = Loads()
    loads.update({"a": counted(0, 0)}, now=0)
    loads.update({"a": counted(10, 1)}, now=2)
    loads.update({}, now=4)
    assert loads.of_a_step("a") == {"wait": None, "compute": None}
