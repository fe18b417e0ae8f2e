"""Coordinates of peers on a globe, with the lines that connect them to it; and hostile ones."""

import math
from itertools import product
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.protocol.checks import BadValueError
from petals.protocol.coordinates import (
    DIMENSIONS,
    LEAST_ERROR,
    LEAST_HEIGHT,
    MAX_MOVE,
    MAX_SECONDS,
    Coordinate,
    checked,
    relaxed,
)
from support.announcements import dice

CITIES = [(40, -74), (37, -122), (51, 0), (50, 9), (36, 140), (1, 104), (-34, 151), (-23, -46)]
LINES = (0.001, 0.004, 0.012)
PEERS = list(product(CITIES, LINES))
"""Where each peer is, and what its own line adds to every way."""


def round_trip(one: int, other: int) -> float:
    """Seconds: light in cables that take detours, and both lines, there and back."""
    (here, line), (there, others_line) = PEERS[one], PEERS[other]
    (north, east), (norths, easts) = (map(math.radians, place) for place in (here, there))
    cosine = math.sin(north) * math.sin(norths)
    cosine += math.cos(north) * math.cos(norths) * math.cos(east - easts)
    return 2 * (6371 * math.acos(min(1.0, cosine)) * 1.6 / 200_000 + line + others_line)


def settled() -> list[Coordinate]:
    """A swarm in which all started at once, knowing nothing, and measured a few others."""
    rolls = dice(3)
    points = [Coordinate()] * len(PEERS)
    others = [sorted(range(len(PEERS)), key=lambda _: rolls.random())[:12] for _ in PEERS]
    for _ in range(12):
        for peer in range(len(PEERS)):
            measured = [
                (points[other], round_trip(peer, other)) for other in others[peer] if other != peer
            ]
            points[peer] = relaxed(points[peer], measured, rolls)
    return points


SETTLED = settled()
PAIRS = [(one, other) for one in range(len(PEERS)) for other in range(one)]


def missed(one: int, other: int) -> float:
    truth = round_trip(one, other)
    return abs(SETTLED[one].distance(SETTLED[other]) - truth) / truth


def test_most_ways_between_peers_that_never_met_are_known_to_a_tenth() -> None:
    assert median(missed(*pair) for pair in PAIRS) < 0.1
    assert sum(missed(*pair) < 0.5 for pair in PAIRS) > 0.9 * len(PAIRS)


def test_a_line_of_ones_own_is_a_height() -> None:
    short, _, long = (sum(point.height for point in SETTLED[n :: len(LINES)]) for n in range(3))
    assert short < long / 2


def test_whoever_comes_later_finds_its_place_by_a_few_measurements() -> None:
    rolls = dice(4)
    for newcomer in range(0, len(PEERS), 5):
        measured = [
            (SETTLED[other], round_trip(newcomer, other))
            for other in range(len(PEERS))
            if other != newcomer
        ]
        found = relaxed(Coordinate(), measured, rolls)
        errors = [abs(found.distance(point) - truth) / truth for point, truth in measured]
        assert median(errors) < 0.15
        assert found.error < 0.5


def test_two_at_one_place_part_in_some_direction() -> None:
    moved = Coordinate().moved(Coordinate(), 0.04, dice())
    assert moved.height == LEAST_HEIGHT
    assert any(moved.position)


def test_nothing_measured_moves_nobody() -> None:
    assert relaxed(Coordinate(), [], dice()) == Coordinate()


seconds = st.floats(-MAX_SECONDS, MAX_SECONDS)
points = st.builds(
    Coordinate,
    st.tuples(*[seconds] * DIMENSIONS),
    st.floats(LEAST_HEIGHT, MAX_SECONDS),
    st.floats(0.01, 1.0),
)


@given(points, points, st.floats(0, MAX_SECONDS))
def test_whatever_another_says_it_moves_us_by_a_little_only(
    own: Coordinate, liar: Coordinate, measured: float
) -> None:
    moved = own.moved(liar, measured, dice())
    assert math.dist(own.position, moved.position) <= MAX_MOVE * 1.001
    assert abs(own.height - moved.height) <= MAX_MOVE * 1.001
    assert LEAST_HEIGHT <= moved.height <= MAX_SECONDS
    assert LEAST_ERROR <= moved.error <= 1
    assert all(abs(part) <= MAX_SECONDS for part in moved.position)
    assert checked(moved.plain()).distance(moved) <= 2 * moved.height + 1e-4


@pytest.mark.parametrize("bad", [None, [], [0, 0, 0, 1], [0, 0, 0, 0, 5], [0.0, 0, 0, 1, 5]])
def test_what_is_no_point_is_refused(bad: object) -> None:
    with pytest.raises(BadValueError):
        checked(bad)
