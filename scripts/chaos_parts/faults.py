"""Carries the schedule out: each fault on a node that may be hurt, in a task that heals it again."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from .nodes import TormentedNode
from .schedule import Fault, Kind, may_be_hurt

SETTLED = 3.0
"""Seconds that a healed node is spared: by then others know that it is there again."""


@dataclass
class Tormentor:
    """Hurts nodes, and knows what it has done."""

    nodes: Sequence[TormentedNode]
    dice: random.Random
    say: Callable[[str], None]
    injected: Counter[Kind] = field(default_factory=Counter)
    skipped: int = 0
    """Faults for which no node could be hurt."""

    async def run(self, faults: Sequence[Fault]) -> None:
        """All faults in their time; returns when the last node is whole again."""
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            for fault in faults:
                await trio.sleep_until(begin + fault.at)
                by_name = {node.name: node for node in self.nodes}
                spans = {node.name: str(node.span) for node in self.nodes}
                whole = [node.name for node in self.nodes if node.whole]
                victims = may_be_hurt(spans, whole)
                if not victims:
                    self.skipped += 1
                    continue
                victim = by_name[self.dice.choice(victims)]
                victim.whole = False
                self.injected[fault.kind] += 1
                lasting = f" for {fault.seconds:.1f} s" if fault.seconds else ""
                self.say(f"{fault.at:6.1f} s  {fault.kind} {victim.name} ({victim.span}){lasting}")
                nursery.start_soon(self._hurt, victim, fault)

    async def _hurt(self, node: TormentedNode, fault: Fault) -> None:
        match fault.kind:
            case Kind.KILL | Kind.REPLACE | Kind.LEAVE:
                node.signal(signal.SIGTERM if fault.kind is Kind.LEAVE else signal.SIGKILL)
                await node.gone()
                if fault.kind is Kind.REPLACE:
                    node.forget_key()
                await node.start()
                node.whole = False  # until others know
            case Kind.HANG:
                node.signal(signal.SIGSTOP)
                try:
                    await trio.sleep(fault.seconds)
                finally:
                    node.signal(signal.SIGCONT)
            case Kind.CUT:
                node.proxy.cut()
            case Kind.OUTAGE:
                node.proxy.refusing = True
                node.proxy.cut()
                await trio.sleep(fault.seconds)
                node.proxy.refusing = False
            case Kind.DELAY:
                node.proxy.delay = fault.delay
                await trio.sleep(fault.seconds)
                node.proxy.delay = 0.0
        await trio.sleep(SETTLED)
        node.whole = True
