import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.protocol.checks import MAX_PAST, Rewind
from petals.protocol.log import OutputLog, RewindHistory, combined
from petals.protocol.tensor import DType, WireTensor
from support.sessions import HIDDEN_SIZE, hidden, letters


def log_of(*chunks: str, batch: int = 1) -> OutputLog:
    log = OutputLog(batch, HIDDEN_SIZE, DType.FLOAT16)
    for chunk in chunks:
        log.append(hidden(chunk))
    return log


# --- OutputLog ------------------------------------------------------------------------------------


def test_chunks_are_joined_when_they_are_read() -> None:
    log = log_of("ab", "c", "def")
    assert log.end == 6
    assert letters(log.read(0, 6)) == "abcdef"
    assert letters(log.read(1, 4)) == "bcd"
    assert letters(log.read(2, 3)) == "c"


def test_each_sequence_of_a_batch_keeps_its_rows() -> None:
    log = log_of("ab/AB", "cde/CDE", batch=2)
    assert letters(log.read(1, 4)) == "bcd/BCD"
    log.truncate(3)
    log.append(hidden("xy/XY"))
    assert letters(log.read(0, 5)) == "abcxy/ABCXY"


def test_a_chunk_of_one_sequence_is_read_without_a_copy() -> None:
    data = memoryview(b"aaaabbbbcccc")
    log = OutputLog(1, HIDDEN_SIZE, DType.FLOAT16)
    log.append(WireTensor(DType.FLOAT16, (1, 3, HIDDEN_SIZE), data))
    read = log.read(1, 3)
    assert isinstance(read.data, memoryview)
    assert read.data.obj is data.obj


def test_truncating_beyond_the_end_changes_nothing() -> None:
    log = log_of("ab", "c")
    log.truncate(3)
    log.truncate(7)
    assert letters(log.read(0, 3)) == "abc"


def test_a_log_can_be_emptied_and_filled_again() -> None:
    log = log_of("ab")
    log.truncate(0)
    assert log.end == 0
    log.append(hidden("x"))
    assert letters(log.read(0, 1)) == "x"


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 1), (-1, 1), (0, 4), (3, 3)])
def test_only_rows_that_it_holds_can_be_read(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"rows {start}\.\.{stop} of a log that holds 0\.\.3"):
        log_of("abc").read(start, stop)


@pytest.mark.parametrize(
    "wrong",
    [
        hidden("ab/AB"),
        WireTensor(DType.BFLOAT16, (1, 1, HIDDEN_SIZE), bytes(4)),
        WireTensor(DType.FLOAT16, (1, 1, 3), bytes(6)),
    ],
)
def test_rows_of_another_shape_or_type_are_a_mistake(wrong: WireTensor) -> None:
    with pytest.raises(ValueError, match="cannot take"):
        log_of("abc").append(wrong)


def test_a_log_shows_what_it_holds() -> None:
    assert repr(log_of("ab", "c")) == "OutputLog(0..3, float16 [1, rows, 2])"


def test_sequences_take_the_place_of_others_without_a_copy() -> None:
    log = log_of("ab/kl/uv", batch=3)
    log.reorder((2, 0, 0))
    assert letters(log.read(0, 2)) == "uv/ab/ab"
    log.append(hidden("c/m/w"))
    log.reorder((1, 1, 2))
    assert letters(log.read(0, 3)) == "abm/abm/abw"
    log.truncate(1)
    assert letters(log.read(0, 1)) == "a/a/a"
    log.reorder(())
    log.append(hidden("x/y/z"))
    assert letters(log.read(0, 2)) == "ax/ay/az"


def test_a_chunk_that_is_cut_keeps_its_order() -> None:
    log = log_of("abc/klm", batch=2)
    log.reorder((1, 0))
    log.truncate(2)
    assert letters(log.read(0, 2)) == "kl/ab"


def test_orders_are_combined_one_after_the_other() -> None:
    assert combined([]) == ()
    assert combined([Rewind(1, 9, (1, 1, 0)), Rewind(2, 9), Rewind(3, 9, (2, 0, 1))]) == (0, 1, 1)
    assert combined([Rewind(1, 9, (1, 0)), Rewind(2, 9, (1, 0))]) == ()


@given(batch=st.integers(1, 3), data=st.data())
def test_a_log_is_a_list_of_rows(batch: int, data: st.DataObject) -> None:
    log = OutputLog(batch, HIDDEN_SIZE, DType.FLOAT16)
    twin: list[str] = []  # one text a position, a letter a sequence
    row = st.text("abcdefgh", min_size=batch, max_size=batch)
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            rows = data.draw(st.lists(row, min_size=1, max_size=4))
            log.append(hidden("/".join("".join(lane) for lane in zip(*rows, strict=True))))
            twin += rows
        else:
            position = data.draw(st.integers(0, len(twin) + 1))
            log.truncate(position)
            order = data.draw(st.tuples(*[st.integers(0, batch - 1)] * batch))
            log.reorder(order)
            twin = ["".join(rows[lane] for lane in order) for rows in twin[:position]]
        assert log.end == len(twin)
        if twin:
            start = data.draw(st.integers(0, len(twin) - 1))
            stop = data.draw(st.integers(start + 1, len(twin)))
            lanes = zip(*twin[start:stop], strict=True)
            assert letters(log.read(start, stop)) == "/".join("".join(lane) for lane in lanes)


# --- RewindHistory --------------------------------------------------------------------------------


def test_nothing_is_void_before_the_first_rewind() -> None:
    history = RewindHistory()
    assert history.current == 0
    assert history.valid_prefix(0, 7) == 7


def test_what_was_held_before_a_rewind_is_true_up_to_its_cut() -> None:
    history = RewindHistory()
    history.record(1, 5)
    assert history.valid_prefix(0, 7) == 5
    assert history.valid_prefix(0, 3) == 3
    assert history.valid_prefix(1, 7) == 7


def test_the_deepest_later_cut_counts() -> None:
    history = RewindHistory()
    history.record(1, 2)
    history.record(2, 6)
    history.record(3, 4)
    assert [history.valid_prefix(rewind, 9) for rewind in range(4)] == [2, 4, 4, 9]


def test_cuts_that_a_deeper_one_has_swallowed_are_forgotten() -> None:
    history = RewindHistory()
    history.record(1, 3)
    for rewind in range(2, 100):
        history.record(rewind, 5)
    assert repr(history) == "RewindHistory(current=99, cuts=[(1, 3), (99, 5)])"


@pytest.mark.parametrize("rewind", [0, 1, 2])
def test_rewinds_are_recorded_in_order(rewind: int) -> None:
    history = RewindHistory()
    history.record(2, 5)
    with pytest.raises(ValueError, match=f"rewind {rewind} is not newer than 2"):
        history.record(rewind, 1)


@given(st.data())
def test_a_history_knows_what_a_log_with_every_version_kept_knows(data: st.DataObject) -> None:
    """The twin numbers every row ever made, and keeps the whole log of every rewind."""
    history = RewindHistory()
    log: list[int] = []
    versions: dict[int, list[int]] = {}
    made = rewind = 0
    for _ in range(data.draw(st.integers(1, 15))):
        new = data.draw(st.integers(0, 4))
        log += range(made, made + new)
        made += new
        versions[rewind] = list(log)
        if data.draw(st.booleans()):
            rewind += data.draw(st.integers(1, 3))  # this hop has missed some
            position = data.draw(st.integers(0, len(log)))
            history.record(rewind, position)
            del log[position:]
            versions[rewind] = list(log)
    for held_at, version in versions.items():
        for position in range(len(version) + 1):
            held = version[:position]
            still_true = sum(row in log for row in held)
            assert history.valid_prefix(held_at, position) == still_true
            assert log[:still_true] == held[:still_true]


def test_the_latest_rewinds_are_known_with_their_orders() -> None:
    history = RewindHistory()
    rewinds = [Rewind(number, 5, (1, 0)) for number in range(1, MAX_PAST + 3)]
    for rewind in rewinds:
        history.record(*rewind)
    assert history.since(0) == tuple(rewinds[2:])
    assert history.since(MAX_PAST) == tuple(rewinds[MAX_PAST:])
    assert history.since(MAX_PAST + 2) == ()


def test_what_was_held_before_an_order_that_is_forgotten_cannot_be_used() -> None:
    history = RewindHistory()
    history.record(1, 5, (1, 0))
    for rewind in range(2, MAX_PAST + 3):
        history.record(rewind, 5)  # that these are forgotten, too, harms nobody
    assert history.valid_prefix(0, 3) == 0
    assert history.valid_prefix(1, 3) == 3


def test_a_history_takes_over_what_its_sender_tells() -> None:
    history = RewindHistory()
    history.record(1, 8)
    history.adopt(9, 4, (Rewind(8, 6, (1, 0)), Rewind(9, 5)))
    assert history.current == 9
    assert history.since(7) == (Rewind(8, 6, (1, 0)), Rewind(9, 5))
    assert [history.valid_prefix(rewind, 9) for rewind in (1, 7, 8, 9)] == [4, 5, 5, 9]
    history.adopt(10, 9, (Rewind(10, 9, (0, 0)),))
    assert history.since(9) == (Rewind(10, 9, (0, 0)),)
