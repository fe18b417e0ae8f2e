"""What a session remembers of its losses."""

from petals.node.mending import MAX_REMEMBERED, Mending
from petals.protocol.routing import RouteHop
from petals.protocol.span import Span


class Clock:
    """Says what it is told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def hop(peer_id: str, start: int, end: int) -> RouteHop:
    return RouteHop(peer_id, (), Span(start, end))


def test_a_loss_is_told_from_the_first_moment_to_the_last() -> None:
    clock = Clock()
    mending = Mending(clock)
    mending.lost(hop("a", 0, 4), "it hung")
    [open_] = mending.recoveries
    assert (open_.at, open_.lost.peer_id, open_.reason) == (100, "a", "it hung")
    assert (open_.replaced_by, open_.pause) == ((), None)

    mending.routed([hop("b", 0, 2), hop("c", 2, 4)])
    [found] = mending.recoveries
    assert [other.peer_id for other in found.replaced_by] == ["b", "c"]
    assert found.pause is None

    clock.now = 101.5
    mending.returned()
    [over] = mending.recoveries
    assert over.pause == 1.5
    clock.now = 200.0
    mending.returned()
    assert mending.recoveries == (over,)


def test_rows_that_were_under_way_end_no_pause() -> None:
    mending = Mending(Clock())
    mending.lost(hop("a", 0, 4), "it hung")
    mending.returned()
    assert mending.recoveries[0].pause is None


def test_of_two_losses_each_is_replaced_by_who_has_its_blocks() -> None:
    mending = Mending(Clock())
    mending.lost(hop("a", 0, 4), "gone")
    mending.lost(hop("b", 4, 8), "gone")
    mending.routed([hop("c", 0, 3), hop("d", 3, 8)])
    assert [[other.peer_id for other in each.replaced_by] for each in mending.recoveries] == [
        ["c", "d"],
        ["d"],
    ]


def test_only_so_many_are_remembered() -> None:
    mending = Mending(Clock())
    for number in range(3 * MAX_REMEMBERED):
        mending.lost(hop(str(number), 0, 1), "gone")
        if number % 2:
            mending.routed([hop("z", 0, 1)])
            mending.returned()
    assert len(mending.recoveries) == MAX_REMEMBERED
    assert mending.recoveries[-1].lost.peer_id == str(3 * MAX_REMEMBERED - 1)
