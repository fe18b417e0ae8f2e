"""Who may be believed about rows that are not computed again."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.protocol import prefix
from petals.protocol.prefix import (
    MAX_PREFIXES,
    PREFIX_ROWS,
    HashedInputs,
    VouchedInputs,
    boundaries,
    last_boundary,
    offers,
    output_digest,
    storage_keys,
    vouched_from,
)
from petals.protocol.span import Span
from petals.protocol.tensor import DType

WIDTH = 2
ROW_BYTES = 4
FIRST, SECOND = Span(0, 2), Span(2, 4)


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boundaries at 4, 8, 12, 16; none is named behind that."""
    monkeypatch.setattr(prefix, "PREFIX_ROWS", 4)
    monkeypatch.setattr(prefix, "MAX_PREFIXES", 4)


short = pytest.mark.usefixtures("_short")


def rows(text: str) -> bytes:
    """A row of two float16 for each letter."""
    return b"".join(letter.encode() * ROW_BYTES for letter in text)


def inputs(text: str = "", known: list[bytes] | None = None) -> HashedInputs:
    hashed = HashedInputs(WIDTH, DType.FLOAT16, known or [])
    hashed.take(0, len(text), rows(text))
    return hashed


def digests(text: str) -> list[bytes]:
    return inputs(text).digests


# --- positions ------------------------------------------------------------------------------------


def test_boundaries_are_counted_in_the_rows_before_them() -> None:
    assert list(boundaries(0, 31)) == []
    assert list(boundaries(0, 32)) == [32]
    assert list(boundaries(32, 96)) == [64, 96]
    assert list(boundaries(33, 64)) == [64]
    end = MAX_PREFIXES * PREFIX_ROWS
    assert list(boundaries(end - 1, end + 100)) == [end]
    assert list(boundaries(end, end + 100)) == []


def test_one_row_is_left_to_be_computed() -> None:
    assert [last_boundary(length) for length in (0, 1, 32, 33, 64, 65)] == [0, 0, 0, 32, 32, 64]
    assert last_boundary(1 << 20) == MAX_PREFIXES * PREFIX_ROWS


# --- what the first hop hashes --------------------------------------------------------------------


@short
def test_the_digest_of_a_boundary_is_of_all_rows_before_it() -> None:
    first, second = digests("abcdefgh")
    assert digests("abcdefghi") == [first, second]
    assert digests("abcdEfgh")[0] == first
    assert digests("abcdEfgh")[1] != second
    assert digests("Abcdefgh")[1] != second
    assert first != hashlib.sha256(rows("abcd")).digest()


def test_digests_differ_by_what_the_bytes_mean() -> None:
    data = bytes(PREFIX_ROWS * 8)
    seen = set()
    for width, dtype in [(2, DType.FLOAT32), (4, DType.FLOAT16), (4, DType.BFLOAT16)]:
        hashed = HashedInputs(width, dtype)
        hashed.take(0, PREFIX_ROWS, data)
        seen.update(hashed.digests)
    assert len(seen) == 3


@given(text=st.text("abc", max_size=20), cuts=st.lists(st.integers(1, 6), max_size=20))
def test_however_rows_are_cut_into_steps(text: str, cuts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "PREFIX_ROWS", 4)
        hashed, at = inputs(), 0
        for cut in [*cuts, len(text)]:
            piece = text[at : at + cut]
            hashed.take(at, len(piece), memoryview(rows(piece)))
            at += len(piece)
        assert hashed.rows == len(text)
        assert hashed.digests == digests(text)


@given(data=st.data())
def test_a_rewind_leaves_what_is_still_known_and_never_what_is_not_true(
    data: st.DataObject,
) -> None:
    """Against a twin that hashes the whole text anew each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "PREFIX_ROWS", 4)
        hashed, text = inputs(), ""
        for _ in range(data.draw(st.integers(1, 6))):
            position = data.draw(st.integers(0, len(text)))
            piece = data.draw(st.text("ab", min_size=1, max_size=9))
            hashed.take(position, len(piece), rows(piece))
            text = text[:position] + piece
            right = digests(text)
            assert hashed.digests == right[: len(hashed.digests)]
            if position % 4 == 0 and len(hashed.digests) >= position // 4:
                assert hashed.digests == right


@short
def test_a_rewind_within_the_rows_behind_the_last_boundary_costs_nothing() -> None:
    hashed = inputs("abcdefg")
    hashed.take(5, 3, rows("xyz"))
    assert hashed.digests == digests("abcdexyz")


@short
def test_a_rewind_into_rows_already_hashed_ends_there() -> None:
    hashed = inputs("abcdefghijkl")
    hashed.take(6, 10, rows("klmnopqrst"))
    assert hashed.digests == digests("abcd")
    hashed.take(16, 4, rows("uvwx"))
    assert hashed.digests == digests("abcd")
    hashed.take(4, 4, rows("efgh"))
    assert hashed.digests == digests("abcdefgh"), "from a boundary it goes on"


@short
def test_no_more_is_hashed_than_can_be_offered() -> None:
    hashed = inputs("abcdefghijklmnopqrst")
    assert hashed.digests == digests("abcdefghijklmnop")
    hashed.take(20, 1, rows("u"))
    hashed.take(13, 3, rows("xyz"))
    assert len(hashed.digests) == 3
    hashed.take(8, 8, rows("ijklmnop"))
    assert hashed.digests == digests("abcdefghijklmnop")


@short
def test_restored_rows_need_not_be_hashed_again() -> None:
    hashed = HashedInputs(WIDTH, DType.FLOAT16, digests("abcdefgh"))
    assert hashed.rows == 8
    hashed.take(8, 4, rows("ijkl"))
    assert hashed.digests == digests("abcdefghijkl")


# --- keys -----------------------------------------------------------------------------------------


def keys(
    entries: list[bytes],
    predecessor: str | None = "a",
    span: Span = SECOND,
    wire_dtype: DType = DType.FLOAT16,
) -> list[bytes]:
    return storage_keys(entries, predecessor=predecessor, span=span, wire_dtype=wire_dtype)


def test_a_storage_key_depends_on_everything_that_the_rows_depend_on() -> None:
    entry = [bytes(32)]
    seen = [
        keys(entry),
        keys([bytes(31) + b"x"]),
        keys(entry, predecessor="b"),
        keys(entry, predecessor=None),
        keys(entry, predecessor="embeddings"),
        keys(entry, span=Span(2, 5)),
        keys(entry, wire_dtype=DType.BFLOAT16),
    ]
    assert len({key for [key] in seen}) == len(seen)


def test_a_storage_key_vouches_for_all_entries_before_it() -> None:
    """Else an offer could hide a false digest before a true one, and go on from there."""
    one, two, false = bytes(32), b"2" * 32, b"x" * 32
    assert keys([one, two])[0] == keys([one])[0]
    assert keys([one, two])[1] not in (keys([false, two])[1], keys([two])[0])
    after = storage_keys(
        [two], predecessor="a", span=SECOND, wire_dtype=DType.FLOAT16, before=keys([one])[0]
    )
    assert after == keys([one, two])[1:]


def test_an_originator_works_out_what_enters_every_hop() -> None:
    entries = [b"1" * 32, b"2" * 32]
    first, second, third = offers(
        entries, [("a", FIRST), ("b", SECOND), ("c", Span(4, 6))], DType.FLOAT16
    )
    assert list(first) == entries
    assert list(second) == [output_digest(key, FIRST) for key in keys(entries, None, FIRST)]
    assert list(third) == [output_digest(key, SECOND) for key in keys(list(second), "a", SECOND)]


def test_only_what_a_liar_could_lie_to_anyway_finds_his_keys() -> None:
    """The hop behind b names its rows by b: whatever mallory vouches for has other names."""
    truth = [b"1" * 32]
    behind_b, behind_mallory = keys(truth, "b"), keys(truth, "mallory")
    assert behind_b != behind_mallory


@short
def test_a_step_carries_the_digests_at_its_start_and_in_its_rows() -> None:
    outputs = [b"4", b"8", b"12"]
    assert vouched_from(0, 3, outputs) == ()
    assert vouched_from(0, 4, outputs) == (b"4",)
    assert vouched_from(4, 9, outputs) == (b"4", b"8")
    assert vouched_from(5, 9, outputs) == (b"8",)
    assert vouched_from(8, 20, outputs) == (b"8", b"12")
    assert vouched_from(16, 20, outputs) == ()


# --- what the others are told ---------------------------------------------------------------------

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


@short
def test_a_predecessor_that_begins_at_the_beginning_is_followed() -> None:
    vouched = VouchedInputs()
    vouched.take(0, 5, [A])
    vouched.take(5, 2, [])
    vouched.take(7, 1, [B])
    vouched.take(8, 4, [B, C])
    assert vouched.digests == [A, B, C]


@short
def test_rows_that_nobody_vouches_for_end_it() -> None:
    vouched = VouchedInputs()
    vouched.take(0, 8, [A])
    vouched.take(8, 4, [B, C])
    assert vouched.digests == [A]


@short
def test_more_than_belongs_to_the_rows_is_not_taken() -> None:
    vouched = VouchedInputs()
    vouched.take(0, 5, [A, B, C])
    assert vouched.digests == [A]


@short
def test_behind_restored_rows_the_predecessor_must_prove_that_it_goes_on_from_them() -> None:
    honest, lying, silent = VouchedInputs([A, B]), VouchedInputs([A, B]), VouchedInputs([A, B])
    honest.take(8, 4, [B, C])
    lying.take(8, 4, [A, C])
    silent.take(8, 4, [])
    assert honest.digests == [A, B, C]
    assert lying.digests == silent.digests == [A, B]


@short
def test_so_it_must_on_every_new_link() -> None:
    """The predecessor's session may have been opened anew, with another text."""
    same, another, between = VouchedInputs(), VouchedInputs(), VouchedInputs()
    for vouched in (same, another, between):
        vouched.take(0, 4, [A])
    between.take(4, 1, [A])
    for vouched in (same, another, between):
        vouched.linked()
    same.take(4, 4, [A, B])
    another.take(4, 4, [C, B])
    between.take(5, 3, [B])
    assert same.digests == [A, B]
    assert another.digests == between.digests == [A]


@short
def test_a_rewind_on_the_same_link_cuts_and_goes_on() -> None:
    vouched = VouchedInputs()
    vouched.take(0, 12, [A, B, C])
    vouched.take(5, 4, [C])
    assert vouched.digests == [A, C]
    vouched.take(0, 4, [B])
    assert vouched.digests == [B]


@short
def test_what_was_restored_and_cut_proves_nothing() -> None:
    vouched = VouchedInputs([A])
    vouched.take(2, 2, [A])
    assert vouched.digests == []
    vouched.take(4, 4, [A, B])
    assert vouched.digests == []


@short
def test_another_predecessor_is_never_followed() -> None:
    vouched = VouchedInputs()
    vouched.take(0, 4, [A])
    vouched.sever()
    vouched.linked()
    vouched.take(4, 4, [A, B])
    assert vouched.digests == [A]
    vouched.take(0, 4, [C])
    assert vouched.digests == []
