"""The best route there is, and what a planned one really costs.

The best one is exact over all nodes: a shortest path over (block, node), where a change of nodes goes
through their cities, so that 70 blocks times 10,000 nodes take a few milliseconds. (That it may come
back to a node makes it a bound that is never dearer than the best ring.)
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from petals.protocol.routing import LOAD_PER_BLOCK, Route

from .population import NUM_BLOCKS, Floats, Ints
from .state import State


def load_seconds(state: State) -> Floats:
    """What the sessions at each node add to a step there."""
    seconds: Floats = LOAD_PER_BLOCK * state.session_blocks / state.population.speed
    return seconds


def best_seconds(state: State, nodes: Ints, originator: int, *, star: bool = False) -> float:
    """The least time of a token around a ring through ``nodes``.

    ``star``: instead, the originator sends to each hop and gets its output back, as a client of
    Petals does.
    """
    people = state.population
    nodes = nodes[np.argsort(people.city[nodes], kind="stable")]
    city, access = people.city[nodes], people.access[nodes]
    cities, firsts = np.unique(city, return_index=True)
    between = people.between[np.ix_(cities, cities)]
    where = np.searchsorted(cities, city)
    block_time, load = 1 / people.speed[nodes], load_seconds(state)[nodes]
    start = state.start[nodes]
    end = start + people.length[nodes]
    to_originator = (
        people.access[originator] + access + people.between[people.city[originator], city]
    )
    to_originator = np.where(nodes == originator, 0.0, to_originator)
    cost = np.where(start == 0, to_originator + load + block_time, np.inf)
    for block in range(1, NUM_BLOCKS):
        if star:
            switched = np.min(cost + to_originator) + to_originator
        else:
            leaving = np.minimum.reduceat(cost + access, firsts)
            switched = (leaving[:, None] + between).min(axis=0)[where] + access
        holds = (start <= block) & (block < end)
        cost = np.where(holds, np.minimum(cost, switched + load) + block_time, np.inf)
    return float(np.min(cost + to_originator))


def true_seconds(state: State, route: Route, numbers: list[int], originator: int) -> float:
    """The time of a token around a planned ring; ``numbers`` of its hops."""
    speed, load = state.population.speed, load_seconds(state)
    ring = [originator, *numbers, originator]
    ways = sum(state.population.latency(here, there) for here, there in pairwise(ring))
    return ways + sum(
        len(hop.span) / float(speed[number]) + float(load[number])
        for hop, number in zip(route.hops, numbers, strict=True)
    )
