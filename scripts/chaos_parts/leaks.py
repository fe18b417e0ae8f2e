"""What is left at the nodes when all sessions have ended: it must be nothing.

Sessions, their cache and their steps must be gone, and so must their streams and tasks. A connection has
tasks, too, and how many connections a node has changes with the swarm. So what a node's own tasks are
is taken from nodes that have just begun, before the first session, less those of their connections and
streams; no more may be there at the end. There is no slack: what comes and goes by itself (a question to
the directory, say) is waited for, until a look finds a node with nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import trio
from petals.node.node import Node

from .nodes import IDLE, TormentedNode

DEADLINE = 60.0
"""Seconds until nothing must be left: sessions whose originator was cut off linger for ten."""
TASKS_PER_CONNECTION = 4
"""Of ``node/libp2p_yamux.py`` and the library."""
ASKING = 1
"""Streams of a node that is asked: the one on which it is asked, which has a task, too."""

Figures = Mapping[str, float]


async def own_tasks(asker: Node, nodes: Sequence[TormentedNode]) -> float:
    """How many tasks a node has that serves nobody yet, its connections and streams apart."""
    return max([_own_tasks(await _figures_at_rest(asker, node)) for node in nodes])


async def leaks(asker: Node, nodes: Sequence[TormentedNode], own: float) -> list[str]:
    """What the nodes still hold, in words. ``own``: tasks that a node has of itself."""
    found: list[str] = []
    for node in nodes:
        held = ["does not answer"]
        with trio.move_on_after(DEADLINE):
            while held:
                figures = await node.figures(asker)
                if figures:
                    held = _held(figures, own)
                if held:
                    await trio.sleep(0.5)
        found += [f"{node.name}: {what}" for what in held]
    return found


async def _figures_at_rest(asker: Node, node: TormentedNode) -> Figures:
    """Its figures at a moment at which nobody but us asks it anything."""
    with trio.fail_after(DEADLINE):
        while True:
            figures = await node.figures(asker)
            if figures and figures["streams"] <= ASKING:
                return figures
            await trio.sleep(0.5)


def _own_tasks(figures: Figures) -> float:
    return figures["tasks"] - TASKS_PER_CONNECTION * figures["connections"] - figures["streams"]


def _held(figures: Figures, own: float) -> list[str]:
    held = [f"{name} {figures[name]:.0f}" for name in IDLE if figures.get(name)]
    if figures["streams"] > ASKING:
        held.append(f"streams {figures['streams'] - ASKING:.0f}")
    if (tasks := _own_tasks(figures) - own) > 0:
        held.append(f"tasks {tasks:.0f}")
    return held
