"""The budget adds up whatever sessions do, and lanes keep what they were given."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from petals.inference.attention import LaneRows, Plan, Scratch
from petals.inference.cache import CachePool, CacheShape, LaneCache, Reservation, SessionCache
from petals.inference.native import native
from petals.protocol.errors import CacheFull, LocalProtocolError

SHAPE = CacheShape(heads=2, head_dim=3, dtype=torch.float32, device=torch.device("cpu"))


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a dumb twin: a list of what is reserved."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = CachePool(100)
        self.held: list[tuple[Reservation, int]] = []
        self.released: list[Reservation] = []

    @rule(tokens=st.integers(1, 120))
    def reserve(self, tokens: int) -> None:
        free = 100 - sum(size for _, size in self.held)
        if tokens <= free:
            self.held.append((self.pool.reserve(tokens), tokens))
            return
        with pytest.raises(CacheFull) as full:
            self.pool.reserve(tokens)
        assert (full.value.retry_after is None) == (tokens > 100)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        reservation, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        reservation.release()
        self.released.append(reservation)

    @precondition(lambda self: self.released)
    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.released)).release()

    @invariant()
    def used_is_what_is_held(self) -> None:
        assert self.pool.used == sum(size for _, size in self.held)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=30, stateful_step_count=20)


@given(
    padding=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 9), max_size=6),
    back=st.integers(0, 10),
)
def test_lanes_hold_the_session_without_its_padding(
    padding: list[int], cuts: list[int], back: int
) -> None:
    cache = SessionCache(SHAPE, batch=len(padding), max_tokens=10, padding=padding)
    for position in sorted(cuts):
        rows = position - cache.position
        computed = [
            rows - cache.padding_rows(lane, cache.position, rows) for lane in range(len(padding))
        ]
        before = [lane.length for lane in cache.lanes]
        cache.advance(position)
        assert [lane.length for lane in cache.lanes] == [
            length + count for length, count in zip(before, computed, strict=True)
        ]
    held = cache.position
    cache.truncate(back)
    assert cache.position == min(held, back)
    assert [lane.length for lane in cache.lanes] == [
        max(0, min(held, back) - skipped) for skipped in padding
    ]


@given(pieces=st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_a_lane_returns_what_was_appended_through_growth(pieces: list[int]) -> None:
    lane = LaneCache(SHAPE, sum(pieces))
    keys = torch.randn(2, sum(pieces), 3)
    for piece in pieces:
        end = lane.length + piece
        for block in (3, 4):
            new = keys[:, lane.length : end] * block
            got_keys, got_values = lane.append(block, new, -new)
            assert torch.equal(got_keys, keys[:, :end] * block)
            assert torch.equal(got_values, -keys[:, :end] * block)
        lane.length = end
    with pytest.raises(LocalProtocolError, match="in a cache reserved for"):
        lane.append(3, keys[:, :1], keys[:, :1])


def test_memory_follows_use_not_reservation() -> None:
    lane = LaneCache(SHAPE, 1_000_000)
    row = torch.zeros(2, 1, 3)
    keys, _ = lane.append(0, row, row)
    assert keys.untyped_storage().nbytes() <= 64 * 2 * 3 * 4
    assert SHAPE.bytes_per_token == 2 * 2 * 3 * 4


def test_blocks_grow_little_and_not_all_at_once() -> None:
    lane = LaneCache(SHAPE, 4000)
    lane.expect(1000)
    most_at_once = 0
    capacities = dict.fromkeys(range(24), 0)
    while lane.length < 2000:
        rows = torch.zeros(2, 1 if lane.length else 1000, 3)
        before = dict(capacities)
        for block in capacities:
            keys, _ = lane.append(block, rows, rows)
            capacities[block] = keys.untyped_storage().nbytes() // (2 * 3 * 4)
        lane.length += rows.shape[1]
        assert max(capacities.values()) <= 1.25 * lane.length
        if rows.shape[1] == 1:
            grown = sum(capacities[block] > before[block] for block in capacities)
            most_at_once = max(most_at_once, grown)
    assert 0 < most_at_once <= 8


@given(st.data())
def test_lanes_take_the_place_of_others(data: st.DataObject) -> None:
    """Beside a dumb twin: a list of numbers per lane; lanes with as much padding may be exchanged."""
    padding = sorted(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=5)))
    cache = SessionCache(SHAPE, batch=len(padding), max_tokens=300, padding=padding)
    twins: list[list[float]] = [[] for _ in padding]
    alike = [[lane for lane, own in enumerate(padding) if own == skipped] for skipped in padding]
    for number in range(data.draw(st.integers(1, 5))):
        cache.reorder(())
        order = [data.draw(st.sampled_from(lanes)) for lanes in alike]
        cache.reorder(order)
        twins = [list(twins[lane]) for lane in order]
        rows = data.draw(st.integers(1, 60))
        for lane, (own, twin) in enumerate(zip(cache.lanes, twins, strict=True)):
            new = rows - cache.padding_rows(lane, cache.position, rows)
            value = 10.0 * number + lane
            if new:
                own.append(0, torch.full((2, new, 3), value), torch.full((2, new, 3), -value))
            twin.extend([value] * new)
        cache.advance(cache.position + rows)
    for own, twin in zip(cache.lanes, twins, strict=True):
        assert own.length == len(twin)
        if twin:
            keys, values = own.make_room(0, 0)
            assert keys[1, : own.length, 2].tolist() == twin
            assert values[0, : own.length, 0].tolist() == [-value for value in twin]


def test_lanes_that_cannot_be_copied_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SessionCache(SHAPE, batch=2, max_tokens=9)
    cache.advance(3)

    def fail(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(LaneCache, "become", fail)
    cache.reorder([1, 0])
    assert cache.position == 3
    with pytest.raises(MemoryError):
        cache.reorder([1, 1])
    assert cache.position == 0


def test_no_key_is_longer_than_is_known() -> None:
    def longest(keys: torch.Tensor) -> torch.Tensor:
        longest: torch.Tensor = keys.norm(dim=2).amax(dim=1)
        return longest

    lane = LaneCache(SHAPE, 200)
    assert torch.equal(lane.key_norms(5), torch.zeros(2))
    first, second = 3 * torch.randn(2, 10, 3), torch.randn(2, 50, 3)
    lane.append(5, first, first)
    lane.length = 10
    assert torch.equal(lane.key_norms(5), longest(first))
    lane.append(5, second, second)
    lane.length = 60
    lane.append(5, second[:, :0], second[:, :0])
    known = torch.maximum(longest(first), longest(second))
    assert torch.equal(lane.key_norms(5), known)
    copy, other = LaneCache(SHAPE, 100), LaneCache(SHAPE, 200)
    for _ in copy.copy_from(lane, 20, 1 << 20):
        pass
    other.become(lane)
    second[0, 0] = torch.nan
    lane.append(5, second, second)
    assert torch.isnan(lane.key_norms(5)[0])
    for taken in (copy, other):
        assert torch.equal(taken.key_norms(5), known), "of its own"


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(-30, 30)), min_size=1, max_size=12))
def test_what_the_last_round_found_of_lanes_holds_while_their_memory_does(
    rounds: list[tuple[int, int]],
) -> None:
    """Whoever decodes beside whom, and however far a lane goes back or on: the same as found anew."""
    if native() is None:
        pytest.skip("nobody reads it without our kernels")
    lanes = [LaneCache(SHAPE, 150) for _ in range(3)]
    blocks = range(2, 5)

    def plan(*caches: LaneCache) -> Plan:
        plan = Plan([LaneRows(cache, 1) for cache in caches], None, Scratch(SHAPE.device))
        plan.prepare(blocks)
        return plan

    for chosen, moved in rounds:
        together = [lane for number, lane in enumerate(lanes) if not chosen >> number & 1]
        if not together:
            lanes[0] = LaneCache(SHAPE, 150)
            continue
        together[0].length = max(0, together[0].length + min(moved, 0))
        if moved % 5 == 0:
            for _ in together[0].shrink(1 << 20):
                pass
        for _ in range(max(1, moved)):
            if max(lane.length for lane in together) == 150:
                break
            decoding = plan(*together).decoding
            for lane in together:
                lane.together = None
            anew = plan(*together).decoding
            assert decoding is not None
            assert anew is not None
            assert np.array_equal(decoding._table, anew._table)
            for lane in together:
                lane.length += 1
