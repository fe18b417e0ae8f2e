"""Who is in a round: priorities, fairness, spans, bounds; a world of letters and whole seconds."""

from collections import Counter, deque
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from petals.inference.pace import Limits, Pace
from petals.inference.schedule import Priority, Schedule, Share, Waiting
from petals.protocol.span import Span

SPAN = Span(0, 4)
LIMITS = Limits(single_rows=4, prefill_rows=8, least_prefill_rows=8, ageing=2.0)


def schedule(limits: Limits = LIMITS) -> Schedule:
    return Schedule(limits, Pace(limits))


def step(
    session: str,
    *,
    rows: int = 1,
    batch: int = 1,
    priority: Priority = Priority.NORMAL,
    span: Span = SPAN,
    since: float = 0.0,
) -> Waiting:
    """A session's name is its originator's letter and a number."""
    return Waiting(session, session[0], priority, span, batch, rows, since)


def names(shares: Sequence[Share[Waiting]]) -> str:
    return " ".join(f"{share.step.session}" for share in shares)


def run(
    machine: Schedule, waiting: list[Waiting], rounds: int, *, seconds: float = 0.0
) -> Counter[str]:
    """Rounds in which every step stays for ever; the rows that each originator got."""
    received: Counter[str] = Counter()
    for number in range(1, rounds + 1):
        now = number * seconds
        for share in machine.take(waiting, now):
            received[share.step.originator] += share.rows * share.step.batch
            share.step.since = now
    return received


def test_all_one_row_steps_and_one_piece_of_one_longer_step() -> None:
    waiting = [step("a1"), step("b1", rows=20), step("c1"), step("d1", rows=20)]
    shares = schedule().take(waiting, 0.0)
    assert names(shares) == "a1 c1 b1"
    assert [share.rows for share in shares] == [1, 1, 8]


def test_a_piece_ends_where_its_step_ends() -> None:
    waiting = step("a1", rows=20)
    machine = schedule()
    pieces = []
    while waiting.done < waiting.rows:
        (share,) = machine.take([waiting], 0.0)
        pieces.append(share.rows)
        waiting.done += share.rows
    assert pieces == [8, 8, 4]


def test_rows_are_counted_over_the_sequences_of_a_batch() -> None:
    wide = step("a1", rows=20, batch=4)
    assert schedule().take([wide], 0.0)[0].rows == 2
    huge = step("a1", rows=20, batch=100)
    assert schedule().take([huge], 0.0)[0].rows == 1
    singles = [step("a1", batch=3), step("b1", batch=2), step("c1", batch=1)]
    assert names(schedule().take(singles, 0.0)) == "a1"
    assert names(schedule().take([step("a1", batch=100)], 0.0)) == "a1"


def test_too_many_one_row_steps_are_taken_in_turns() -> None:
    machine = schedule()
    waiting = [step(f"a{number}") for number in range(9)] + [step("b1")]
    assert names(machine.take(waiting, 0.0)) == "a0 b1 a1 a2"


def test_a_better_class_goes_first() -> None:
    waiting = [
        step("a1", rows=9, priority=Priority.BACKGROUND),
        step("b1", rows=9),
        step("c1", rows=9, priority=Priority.OWN),
    ]
    assert names(schedule().take(waiting, 1.0)) == "c1"
    assert names(schedule().take(waiting[:2], 1.0)) == "b1"


def test_a_step_moves_up_one_class_for_every_period_that_it_waits() -> None:
    for waited, first in ((1.0, "new"), (3.0, "equal"), (5.0, "old")):
        old = step("a1", rows=9, priority=Priority.BACKGROUND, since=10.0 - waited)
        new = step("b1", rows=9, priority=Priority.NORMAL, since=10.0)
        (share,) = schedule().take([new, old], 10.0)
        # In the same class both originators have received nothing, and the older step goes first.
        assert share.step is (new if first == "new" else old)


def test_nobody_starves_behind_a_better_class() -> None:
    machine = schedule()
    waiting = [step("a1", rows=999), step("b1", rows=999, priority=Priority.OWN)]
    received = run(machine, waiting, 100, seconds=0.5)
    assert received["b"] >= 3 * received["a"] > 0


def test_many_sessions_get_no_more_than_one() -> None:
    for seconds in (0.01, 0.5, 5.0):
        waiting = [step(f"a{number}", rows=999) for number in range(10)] + [step("b1", rows=999)]
        received = run(schedule(), waiting, 100, seconds=seconds)
        assert received["a"] == received["b"] == 400
    singles = [step(f"a{number}") for number in range(20)] + [step(f"b{n}") for n in range(3)]
    received = run(schedule(), singles, 100)
    assert received["a"] == received["b"] == 200


def test_an_originator_takes_turns_among_its_own() -> None:
    machine = schedule()
    waiting = [step(f"a{number}", rows=999) for number in range(5)]
    taken = []
    for now in range(1, 11):
        (share,) = machine.take(waiting, float(now))
        share.step.since = float(now)
        taken.append(share.step.session)
    assert taken == [f"a{number}" for number in range(5)] * 2


def test_a_newcomer_is_neither_paid_for_its_absence_nor_punished_for_its_past() -> None:
    machine = schedule()
    old, new = step("a1", rows=999), step("b1", rows=999)
    run(machine, [old], 100)  # nobody else wanted it
    received = run(machine, [old, new], 10)
    assert received["a"] == received["b"] == 40
    run(machine, [old], 100)
    received = run(machine, [old, new], 10)  # it comes back with no claim to what it missed
    assert received["a"] == received["b"] == 40


def test_work_counts_blocks() -> None:
    machine = schedule()
    waiting = [step("a1", rows=999, span=Span(0, 3)), step("b1", rows=999, span=Span(0, 1))]
    received = run(machine, waiting, 120)
    assert received["b"] == 3 * received["a"]


def test_spans_never_mix_and_take_turns() -> None:
    machine = schedule()
    part = Span(1, 3)
    waiting = deque([step("a1"), step("b1", span=part), step("c1"), step("d1", span=part)])
    spans = []
    for now in range(6):
        shares = machine.take(waiting, float(now))
        assert len({share.step.span for share in shares}) == 1
        assert len(shares) == 2
        spans.append(shares[0].step.span)
        for share in shares:
            share.step.since = float(now)
    assert spans.count(part) == 3


def test_an_originator_with_many_spans_gets_half_of_the_rounds() -> None:
    machine = schedule()
    waiting = [step(f"a{n}", span=Span(n, n + 4)) for n in range(1, 9)] + [step("b1")]
    received = run(machine, waiting, 100, seconds=0.1)
    assert received["a"] == received["b"] == 50


def test_the_first_choice_among_spans_is_in_the_round() -> None:
    # b's best step is a longer one; its piece is taken although another's is older.
    waiting = [
        step("a1", rows=9, span=Span(0, 2)),
        step("c1", rows=9),
        step("b1", rows=9, priority=Priority.OWN, since=1.0),
    ]
    assert names(schedule().take(waiting, 1.0)) == "b1"
    waiting = [step("a1", span=Span(0, 2), since=1.0), *(step(f"c{n}") for n in range(9))]
    assert names(schedule().take(waiting, 1.0)).split()[0] == "c0"


def test_originators_are_forgotten_when_there_have_been_too_many() -> None:
    machine = schedule()
    for number in range(5000):
        stranger = Waiting(number, f"stranger {number}", Priority.NORMAL, SPAN, 1, 9, 0.0)
        machine.take([stranger], 0.0)
    assert len(machine._accounts) <= 513


@st.composite
def worlds(draw: st.DrawFn) -> list[Waiting]:
    """Steps that wait, at most one of a session."""
    return [
        step(
            f"{draw(st.sampled_from('abc'))}{number}",
            rows=draw(st.sampled_from([1, 1, 1, 30])),
            batch=draw(st.sampled_from([1, 1, 2, 6])),
            priority=draw(st.sampled_from(Priority)),
            span=draw(st.sampled_from([SPAN, Span(0, 2)])),
            since=draw(st.floats(-10, 0)),
        )
        for number in range(draw(st.integers(1, 9)))
    ]


@given(waiting=worlds(), seconds=st.sampled_from([0.5, 3.0]))
def test_every_round_keeps_the_rules_and_everybody_has_a_turn(
    waiting: list[Waiting], seconds: float
) -> None:
    """Newcomers of the best class arrive all the time, every one under a name of its own.

    Nine sessions of one originator, blocked by one another, need nine turns: at most three periods
    each, until the worst class outranks a fresh step of the best.
    """
    machine = schedule()
    served: set[object] = set()
    for number in range(120):
        now = number * seconds
        stranger = Waiting(("new", number), f"new {number}", Priority.OWN, SPAN, 1, 8, now)
        shares = machine.take([*waiting, stranger], now)
        assert shares
        steps = [share.step for share in shares]
        assert len(set(map(id, steps))) == len(steps)
        assert len({other.span for other in steps}) == 1
        assert sum(other.rows > 1 for other in steps) <= 1
        singles = [other.batch for other in steps if other.rows == 1]
        assert sum(singles) <= LIMITS.single_rows or len(singles) == 1
        for share in shares:
            assert 1 <= share.rows <= share.step.rows
            served.add(share.step.session)
            share.step.since = now
    assert served >= {other.session for other in waiting}
