"""Clocks that go faster: what a swarm does again and again, it does so many times as often."""

import functools
from collections.abc import Callable

from petals.node import node, placing, rebalance
from petals.protocol import upkeep


def hurry(factor: float, change: Callable[[object, str, object], None] = setattr) -> None:
    """Divide the intervals of announcing, reading, moving and joining again; of what lives as long, too."""
    for name in ("SHORTEST_ANNOUNCE", "SHORTEST_REFRESH"):
        change(upkeep, name, getattr(upkeep, name) / factor)
    change(placing, "LOOK_INTERVAL", placing.LOOK_INTERVAL / factor)
    change(node, "REJOIN_INTERVAL", node.REJOIN_INTERVAL / factor)
    usual = rebalance.RebalanceSettings()
    change(
        rebalance,
        "RebalanceSettings",
        functools.partial(
            rebalance.RebalanceSettings,
            urgent_wait=usual.urgent_wait / factor,
            wait=usual.wait / factor,
        ),
    )
