"""The best bottleneck that nodes could have, found in other ways than the product's own."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from petals.protocol.layout import Placed
from petals.protocol.span import Span
from scipy.optimize import Bounds, LinearConstraint, milp

MAX_SEARCH_NODES = 100
"""Of the integer programme's search: a limit in seconds would depend on the machine."""


def throughput(nodes: Sequence[Placed], num_blocks: int) -> list[float]:
    """Tokens per second through each block."""
    sums = [0.0] * num_blocks
    for node in nodes:
        for block in range(node.span.start, node.span.end):
            sums[block] += node.speed / len(node.span)
    return sums


def exhaustive_bottleneck(nodes: Sequence[Placed], num_blocks: int) -> float:
    """The best of all assignments: for a handful of nodes."""
    starts = [range(num_blocks - len(node.span) + 1) for node in nodes]
    return max(
        min(
            throughput(
                [
                    Placed(node.peer_id, Span(start, start + len(node.span)), node.speed)
                    for node, start in zip(nodes, chosen, strict=True)
                ],
                num_blocks,
            )
        )
        for chosen in product(*starts)
    )


def programmed_bottleneck(nodes: Sequence[Placed], num_blocks: int) -> float:
    """The best that an integer programme finds: one variable for each node and start, 0 or 1."""
    places = [
        (number, start)
        for number, node in enumerate(nodes)
        for start in range(num_blocks - len(node.span) + 1)
    ]
    count = len(places)
    rows = np.zeros((len(nodes) + num_blocks, count + 1))
    for column, (number, start) in enumerate(places):
        node = nodes[number]
        rows[number, column] = 1
        span = slice(len(nodes) + start, len(nodes) + start + len(node.span))
        rows[span, column] = node.speed / len(node.span)
    rows[len(nodes) :, count] = -1  # each block's throughput less the bottleneck, at least 0
    once = np.concatenate([np.ones(len(nodes)), np.zeros(num_blocks)])
    at_most = np.concatenate([np.ones(len(nodes)), np.full(num_blocks, np.inf)])
    objective = np.zeros(count + 1)
    objective[count] = -1
    found = milp(
        objective,
        constraints=LinearConstraint(rows, once, at_most),
        integrality=np.append(np.ones(count), 0),
        bounds=Bounds(0, np.append(np.ones(count), np.inf)),
        options={"node_limit": MAX_SEARCH_NODES, "mip_rel_gap": 0.01},
    )
    return float(-found.fun)
