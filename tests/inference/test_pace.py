"""Prefill beside decoding: a machine whose rounds cost what we say, and what the pace makes of it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.inference.pace import Limits, Pace

LIMITS = Limits()
TILE = 8
"""Rows; no piece is smaller."""
BLOCKS = 10


class Machine:
    """A round costs ``base`` seconds and ``row`` for each row of prefill."""

    def __init__(self, *, base: float, row: float) -> None:
        self.base = base
        self.row = row
        self.pace = Pace(LIMITS)
        self.now = 0.0

    def decode(self, session: str = "decoding") -> float:
        self.pace.decoded(session, self.now)
        return self._run(0)

    def mixed(self, session: str = "decoding") -> tuple[int, float]:
        """A round with a row of ``session`` and a piece of another's prefill: rows and seconds."""
        self.pace.decoded(session, self.now)
        rows = self.pace.prefill_rows("prefilling", BLOCKS, self.now)
        return rows, self._run(rows)

    def _run(self, rows: int) -> float:
        seconds = self.base + rows * self.row
        self.pace.ran(prefill_rows=rows, blocks=BLOCKS, seconds=seconds)
        self.now += seconds
        return seconds


def test_alone_a_prefill_takes_large_pieces() -> None:
    machine = Machine(base=0.01, row=1.0)
    assert machine.pace.prefill_rows("prefilling", BLOCKS, 0.0) == LIMITS.prefill_rows
    machine.pace.decoded("prefilling", 0.0)  # its own decoding is no reason for care
    assert machine.pace.prefill_rows("prefilling", BLOCKS, 0.1) == LIMITS.prefill_rows


def test_somebody_who_decoded_lately_is_considered() -> None:
    pace = Pace(LIMITS)
    pace.decoded("other", 1.0)
    pace.decoded("prefilling", 2.0)
    assert pace.prefill_rows("prefilling", BLOCKS, 2.5) == LIMITS.least_prefill_rows
    assert pace.prefill_rows("other", BLOCKS, 3.5) == LIMITS.least_prefill_rows
    assert pace.prefill_rows("prefilling", BLOCKS, 1.0 + LIMITS.quiet + 0.1) == LIMITS.prefill_rows


def test_it_begins_with_little_and_learns_quickly() -> None:
    machine = Machine(base=0.02, row=0.0001)
    machine.decode()
    sizes = [machine.mixed()[0] for _ in range(8)]
    assert sizes[0] == LIMITS.least_prefill_rows
    assert all(later <= 2 * size for size, later in pairwise(sizes))
    assert sizes[-1] >= 350  # (0.1 - 0.02) / 2 seconds of it


@given(
    base=st.floats(0.0005, 0.06),
    row=st.floats(1e-6, 0.0018),
    slower=st.floats(1.0, 3.0),
)
def test_two_rounds_stay_within_the_stall_budget(base: float, row: float, slower: float) -> None:
    """A token waits for the round that it has missed and for its own."""
    machine = Machine(base=base, row=row)
    for _ in range(5):
        machine.decode()
    for number in range(60):
        if number == 30:  # a longer context, or a busier machine
            machine.row *= slower
        rows, seconds = machine.mixed()
        settled = number % 30 > 6
        if settled and rows > LIMITS.least_prefill_rows:
            assert 2 * seconds - base <= LIMITS.stall * 1.05
        if settled and rows > TILE:
            assert rows * machine.row <= LIMITS.stall * 0.8


@pytest.mark.parametrize(("row", "rows"), [(0.001, LIMITS.least_prefill_rows), (0.01, TILE)])
def test_a_machine_that_is_too_slow_still_goes_on(row: float, rows: int) -> None:
    machine = Machine(base=0.5, row=row)
    machine.decode()
    assert [machine.mixed()[0] for _ in range(5)] == [LIMITS.least_prefill_rows, *[rows] * 4]


def test_without_a_round_of_decoding_only_pieces_still_settle_within_the_budget() -> None:
    machine = Machine(base=0.02, row=0.0005)
    seconds = [machine.mixed()[1] for _ in range(20)][-1]
    assert 0.03 < seconds <= LIMITS.stall


def test_costs_are_by_block() -> None:
    machine = Machine(base=0.02, row=0.0005)
    for _ in range(5):
        machine.decode()
    for _ in range(10):
        whole = machine.mixed()[0]
    half = machine.pace.prefill_rows("prefilling", BLOCKS // 2, machine.now)
    assert half > whole
    assert machine.pace.singles_seconds(BLOCKS) == pytest.approx(0.02)
    assert machine.pace.singles_seconds(2 * BLOCKS) == pytest.approx(0.04)


def test_the_tail_of_a_prompt_says_nothing_about_costs() -> None:
    machine = Machine(base=0.02, row=0.0005)
    machine.decode()
    for _ in range(10):
        rows = machine.mixed()[0]
    machine.pace.ran(prefill_rows=2, blocks=BLOCKS, seconds=0.9)
    assert machine.mixed()[0] == rows
