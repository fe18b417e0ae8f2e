"""What is left at the nodes when all sessions have ended: it must be nothing.

Tasks come with connections, too, and how many a node has changes with the swarm. So each node is
compared with what it has when it is left alone: an idle node has so many tasks for each connection and
so many of its own, and a session that leaked would have three or more beyond.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio
from petals.node.node import Node

from .nodes import IDLE, TormentedNode

DEADLINE = 60.0
"""Seconds until nothing must be left: sessions whose originator was cut off linger for ten."""
TASKS_PER_CONNECTION = 6
TASKS = 40
"""Of a node itself: listening, membership, the directory."""


async def leaks(asker: Node, nodes: Sequence[TormentedNode]) -> list[str]:
    """What the nodes still hold, in words."""
    found: list[str] = []
    for node in nodes:
        held: dict[str, float] = {}
        with trio.move_on_after(DEADLINE):
            while True:
                figures = await node.figures(asker)
                held = {name: figures[name] for name in IDLE if figures.get(name)}
                if figures and not held:
                    break
                await trio.sleep(0.5)
        if not figures:
            found.append(f"{node.name} does not answer")
            continue
        found += [f"{node.name}: {name} {value:.0f}" for name, value in held.items()]
        most = TASKS + TASKS_PER_CONNECTION * figures["connections"] + figures["streams"]
        if figures["tasks"] > most:
            found.append(
                f"{node.name}: {figures['tasks']:.0f} tasks with "
                f"{figures['connections']:.0f} connections"
            )
    return found
