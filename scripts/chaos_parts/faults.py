"""Carries the schedule out: each fault on a node that may be hurt, in a task that heals it again."""

from __future__ import annotations

import math
import random
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio
from petals.node.node import Node

from .nodes import TormentedNode
from .schedule import Fault, Kind, may_be_hurt
from .sessions import Stall

SLACK = 0.3
"""Seconds by which a stall may seem to have begun before the fault that caused it: its last token
was under way then."""
HEALED_DEADLINE = 60.0
"""Seconds until a node that is hurt no more must serve, as the originator sees it."""


@dataclass
class Tormentor:
    """Hurts nodes, and knows what it has done."""

    nodes: Sequence[TormentedNode]
    asker: Node
    """An originator: a node is whole when it says so to this one."""
    dice: random.Random
    say: Callable[[str], None]
    injected: list[tuple[float, Kind]] = field(default_factory=list)
    """When, in trio's time, and what."""
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
                self.injected.append((trio.current_time(), fault.kind))
                lasting = f" for {fault.seconds:.1f} s" if fault.seconds else ""
                self.say(f"{fault.at:6.1f} s  {fault.kind} {victim.name} ({victim.span}){lasting}")
                nursery.start_soon(self._hurt, victim, fault)

    def counts(self) -> dict[str, int]:
        """How many faults of each kind."""
        return dict(sorted(Counter(str(kind) for _, kind in self.injected).items()))

    def longest_stalls(self, stalls: Sequence[Stall]) -> dict[str, float]:
        """The longest stall that began behind a fault of each kind, and before the next fault."""
        longest: dict[str, float] = {}
        for stall in stalls:
            before = [kind for at, kind in self.injected if at <= stall.end - stall.seconds + SLACK]
            if before:
                kind = str(before[-1])
                longest[kind] = max(longest.get(kind, 0.0), round(stall.seconds, 2))
        return dict(sorted(longest.items()))

    async def _hurt(self, node: TormentedNode, fault: Fault) -> None:
        match fault.kind:
            case Kind.KILL | Kind.REPLACE | Kind.LEAVE:
                node.signal(signal.SIGTERM if fault.kind is Kind.LEAVE else signal.SIGKILL)
                await node.gone()
                if fault.kind is Kind.REPLACE:
                    node.forget_key()
                await node.start()
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
            case Kind.SILENCE:
                node.proxy.silent = True
                await trio.sleep(fault.seconds)
                node.proxy.silent = False
            case Kind.DELAY:
                node.proxy.delay = fault.delay
                await trio.sleep(fault.seconds)
                node.proxy.delay = 0.0
            case Kind.NARROW:
                node.proxy.rate = fault.rate
                await trio.sleep(fault.seconds)
                node.proxy.rate = math.inf
        with trio.move_on_after(HEALED_DEADLINE):
            while True:
                if await node.serves(self.asker):
                    node.whole = True
                    return
                await trio.sleep(0.2)
        self.say(f"{node.name} does not recover from {fault.kind}")
