"""Rows that others may begin with: what is copied, when it is not, and what is kept in the end."""

from collections.abc import Generator

import pytest
import torch
from petals.inference import prefix_rows
from petals.inference.cache import CacheShape, SessionCache
from petals.inference.prefix_rows import PrefixRows
from petals.inference.tensors import to_wire
from petals.protocol.errors import LocalProtocolError
from petals.protocol.span import Span
from petals.protocol.tensor import DType, WireTensor

SHAPE = CacheShape(heads=2, head_dim=3, dtype=torch.float32, device=torch.device("cpu"))
SPAN = Span(0, 4)


class World:
    """A session's cache and rows; row r of block b has keys ``r + 1000 b`` and their negatives."""

    def __init__(self) -> None:
        self.cache = SessionCache(SHAPE, batch=1, max_tokens=500)
        self.rows = PrefixRows(self.cache, 4)

    @torch.inference_mode()
    def step(self, position: int, rows: int, *, shift: int = 0) -> None:
        self.rows.begin_step(position)
        self.cache.truncate(position)
        self.write(position, rows, shift=shift)
        self.cache.advance(position + rows)
        self.rows.append(position, outputs(position, rows, shift), SPAN)

    def write(self, position: int, rows: int, *, shift: int = 0) -> None:
        numbers = torch.arange(position + shift, position + rows + shift, dtype=torch.float32)
        for block in range(4):
            keys = (numbers[:, None] + 1000 * block).expand(2, rows, 3)
            self.cache.lanes[0].append(block, keys, -keys)

    @torch.inference_mode()
    def cached(self) -> list[list[float]]:
        """The first key of every row, per block; also looks at all others."""
        columns = []
        (lane,) = self.cache.lanes
        for block in range(4):
            keys, values = lane.append(block, torch.empty(2, 0, 3), torch.empty(2, 0, 3))
            assert torch.equal(keys, -values) and (keys == keys[:1, :, :1]).all()
            columns.append(keys[0, :, 0].tolist())
        return columns


def outputs(position: int, rows: int, shift: int = 0) -> WireTensor:
    numbers = torch.arange(position + shift, position + rows + shift, dtype=torch.float32)
    return to_wire(numbers[None, :, None].expand(1, rows, 4).contiguous())


def expected(rows: int) -> list[list[float]]:
    return [[float(row + 1000 * block) for row in range(rows)] for block in range(4)]


def finish(copying: Generator[None, None, WireTensor | None]) -> WireTensor | None:
    try:
        while True:
            next(copying)
    except StopIteration as end:
        result: WireTensor | None = end.value
        return result


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy block by block."""
    monkeypatch.setattr(prefix_rows, "_SLICE_BYTES", 1)


def test_a_copy_has_cache_and_outputs_and_lives_on_its_own() -> None:
    source, other = World(), World()
    source.step(0, 90)
    source.step(90, 1)
    got = finish(other.rows.take_from(source.rows, 64))
    assert got == outputs(0, 64) and other.rows.length == 64 and other.cache.position == 64
    assert (other.rows.span, other.rows.wire_dtype) == (SPAN, DType.FLOAT32)
    source.step(10, 60, shift=500)
    assert other.cached() == expected(64)
    other.step(64, 3)
    assert other.cached() == expected(67)


def test_a_copy_in_slices_survives_what_its_source_does_behind_it(slices: None) -> None:
    source, other = World(), World()
    source.step(0, 90)
    copying = other.rows.take_from(source.rows, 64)
    next(copying)
    source.step(90, 200)  # grows: its tensors are others now
    next(copying)
    for _ in source.rows.keep(64):  # closed
        pass
    assert finish(copying) == outputs(0, 64)
    assert other.cached() == expected(64)


def test_a_source_that_is_cut_meanwhile_gives_nothing(slices: None) -> None:
    source, other = World(), World()
    source.step(0, 90)
    copying = other.rows.take_from(source.rows, 64)
    next(copying)
    source.step(30, 60, shift=500)
    assert finish(copying) is None
    assert (other.rows.length, other.cache.position) == (0, 0)


def test_a_session_that_begins_meanwhile_is_left_alone(slices: None) -> None:
    source, other = World(), World()
    source.step(0, 90)
    copying = other.rows.take_from(source.rows, 64)
    next(copying)
    other.step(0, 5, shift=0)
    assert finish(copying) is None
    assert other.cached() == expected(5)
    assert not other.rows.fresh


def test_a_session_is_fresh_until_it_begins_or_is_given_rows(slices: None) -> None:
    source, other, third = World(), World(), World()
    source.step(0, 90)
    copying = other.rows.take_from(source.rows, 64)
    next(copying)
    assert [world.rows.fresh for world in (source, other, third)] == [False, False, True]
    assert finish(copying) == outputs(0, 64)
    third.rows.take_over(source.rows, 64)
    assert [world.rows.fresh for world in (source, other, third)] == [False] * 3


def test_rows_are_taken_over_with_their_memory() -> None:
    source, other = World(), World()
    source.step(0, 90)
    memory = [keys.data_ptr() for keys, _ in source.cache.lanes[0]._blocks.values()]
    assert other.rows.take_over(source.rows, 64) == outputs(0, 64)
    assert [keys.data_ptr() for keys, _ in other.cache.lanes[0]._blocks.values()] == memory
    assert (other.rows.span, other.rows.wire_dtype) == (SPAN, DType.FLOAT32)
    assert (other.rows.length, other.cache.position) == (64, 64)
    assert (source.rows.length, source.cache.position) == (0, 0)
    other.step(64, 300)
    assert other.cached() == expected(364)
    assert source.cached() == [[]] * 4


def test_rows_that_are_taken_over_stay_within_what_the_new_session_reserved() -> None:
    source, other = World(), World()
    other.cache = SessionCache(SHAPE, batch=1, max_tokens=70)
    other.rows = PrefixRows(other.cache, 4)
    source.step(0, 90)
    other.rows.take_over(source.rows, 64)
    other.step(64, 6)
    with pytest.raises(LocalProtocolError, match="71 tokens in a cache reserved for 70"):
        other.step(70, 1)
    source.step(0, 500)
    assert source.cached() == expected(500)


def test_taking_over_ends_a_copy_and_outlasts_the_clearing_up_behind_the_rows(slices: None) -> None:
    source, copied, other = World(), World(), World()
    source.step(0, 300)
    keeping = source.rows.keep(64)  # closed
    copying = copied.rows.take_from(source.rows, 64)
    next(keeping)
    next(copying)
    other.rows.take_over(source.rows, 64)
    other.step(64, 400)  # grows
    assert list(keeping) == []
    assert finish(copying) is None
    assert copied.rows.length == 0
    assert other.cached() == expected(464)


def test_what_is_kept_takes_no_memory_behind_it(slices: None) -> None:
    source = World()
    source.step(0, 300)
    assert len(list(source.rows.keep(64))) == 4
    (lane,) = source.cache.lanes
    for keys, values in lane._blocks.values():
        assert keys.untyped_storage().nbytes() == values.untyped_storage().nbytes() == 64 * 6 * 4
    assert list(source.rows.keep(64)) == [], "there is nothing left to give back"
    assert source.cached() == expected(64)


def test_rows_in_another_dtype_end_it_until_the_session_begins_again() -> None:
    world = World()
    world.step(0, 5)
    row = torch.ones(1, 1, 4)
    assert not world.rows.append(5, to_wire(row, DType.BFLOAT16), SPAN)
    assert world.rows.length == 0
    assert not world.rows.append(6, to_wire(row), SPAN)
    assert world.rows.append(0, to_wire(row, DType.BFLOAT16), SPAN)
    assert (world.rows.length, world.rows.wire_dtype) == (1, DType.BFLOAT16)
