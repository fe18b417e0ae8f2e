"""What a simulation found: figures beside what they should be and the rival's, and pictures."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from .announcing import entry_bytes
from .policies import Ours, Petals, PetalsReading
from .simulation import WARM_UP, Outcome, Simulation

KILOBYTE = 1000
RIVALS = (Petals, PetalsReading)


@dataclass(frozen=True)
class Figure:
    """One row."""

    name: str
    ours: float
    rivals: tuple[float, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    digits: int = 3

    @property
    def met(self) -> bool | None:
        """Whether ours is as it should be; None if that is not said."""
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or self.ours >= self.at_least) and (
            self.at_most is None or self.ours <= self.at_most
        )

    def cells(self) -> tuple[str, ...]:
        """As a person reads them."""
        aim = f"≥ {self.at_least:g}" if self.at_least is not None else ""
        aim = f"≤ {self.at_most:g}" if self.at_most is not None else aim
        mark = {None: "", True: " ✓", False: " ✗"}[self.met]
        rivals = [f"{value:,.{self.digits}f}" for value in self.rivals] or [""] * len(RIVALS)
        return self.name, f"{self.ours:,.{self.digits}f}", *rivals, aim + mark


def figures(ours: Simulation, rivals: Sequence[Simulation], hours: float) -> list[Figure]:
    """All of them, of what came after the warm-up."""
    policy = ours.policy
    assert isinstance(policy, Ours)
    mine, theirs = ours.outcome, [rival.outcome for rival in rivals]
    seconds = hours * 3600 - WARM_UP
    node_seconds = 60 * sum(mine.settled(mine.nodes))
    announcing = policy.traffic.announcing / node_seconds / KILOBYTE
    reading = policy.traffic.reading / node_seconds / KILOBYTE
    measuring = policy.traffic.measuring / node_seconds / KILOBYTE
    taken, given = policy.busiest_holder(seconds)
    found = [
        Figure("time in which every block is served, %", *_all(_whole, mine, theirs, seconds), 100),
        Figure(
            "weakest block's throughput, of the bound: median",
            *_all(_median_bottleneck, mine, theirs, seconds),
            at_least=0.9,
        ),
        Figure("the same: least", *_all(_least_bottleneck, mine, theirs, seconds), at_least=0.9),
        Figure(
            "a token's time, of the best route's: median",
            *_all(_median_latency, mine, theirs, seconds),
            at_most=1.1,
        ),
        Figure("the same: 95th percentile", *_all(_high_latency, mine, theirs, seconds)),
        Figure(
            "moves of a node in a day",
            *_all(_moves, mine, theirs, seconds),
            at_most=2,
        ),
        Figure("announcing, KB/s of a node", announcing),
        Figure("reading, KB/s of a node", reading),
        Figure("measuring ways, KB/s of a node", measuring),
        Figure("all three", announcing + reading + measuring, at_most=2),
        Figure("bytes of an announcement", entry_bytes(policy.upkeep.round_trips), digits=0),
        Figure("busiest holder: taken in, KB/s", taken / KILOBYTE, digits=1),
        Figure("busiest holder: given out, KB/s", given / KILOBYTE, digits=1),
        Figure("sessions opened", mine.sessions, tuple(each.sessions for each in theirs), digits=0),
        Figure(
            "sessions without a route",
            mine.without_route,
            tuple(each.without_route for each in theirs),
            at_most=0,
            digits=0,
        ),
        Figure("hops that were dead when a session opened", mine.dead_hops, digits=0),
    ]
    if mine.planning:
        milliseconds = [1000 * value for value in mine.planning]
        found += [
            Figure(
                "planning a route, ms of processor: median",
                statistics.median(milliseconds),
                at_most=10,
                digits=1,
            ),
            Figure("the same: 99th percentile", _percentile(milliseconds, 0.99), digits=1),
        ]
    if policy.placement_seconds:
        milliseconds = [1000 * value for value in policy.placement_seconds]
        found += [
            Figure("asking whether to move, ms: median", statistics.median(milliseconds), digits=2),
            Figure("the same: longest", max(milliseconds), digits=1),
        ]
    return found


def _all(
    value: Any, mine: Outcome, theirs: Sequence[Outcome], seconds: float
) -> tuple[float, tuple[float, ...]]:
    return value(mine, seconds), tuple(value(outcome, seconds) for outcome in theirs)


def _whole(outcome: Outcome, seconds: float) -> float:
    return 100 * (1 - outcome.uncovered_seconds / seconds)


def _median_bottleneck(outcome: Outcome, _: float) -> float:
    return statistics.median(outcome.settled(outcome.bottleneck))


def _least_bottleneck(outcome: Outcome, _: float) -> float:
    return min(outcome.settled(outcome.bottleneck))


def _median_latency(outcome: Outcome, _: float) -> float:
    return statistics.median(outcome.latency or [0.0])


def _high_latency(outcome: Outcome, _: float) -> float:
    return _percentile(outcome.latency or [0.0], 0.95)


def _moves(outcome: Outcome, _: float) -> float:
    return 24 * outcome.moves / outcome.node_hours


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def table(title: str, found: Sequence[Figure]) -> Table:
    """To be printed."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("figure", overflow="fold")
    for name in (Ours.name, *(rival.name for rival in RIVALS)):
        shown.add_column(name, justify="right")
    shown.add_column("aim")
    for figure in found:
        style = {None: None, True: "green", False: "red"}[figure.met]
        shown.add_row(*figure.cells(), style=style)
    return shown


def markdown(found: Sequence[Figure]) -> str:
    """For the README."""
    names = [Ours.name, *(rival.name for rival in RIVALS)]
    lines = [f"| figure | {' | '.join(names)} | aim |", f"|---|{'---:|' * len(names)}---|"]
    lines += [f"| {' | '.join(figure.cells())} |" for figure in found]
    return "\n".join(lines)


def as_data(found: Sequence[Figure], simulations: Sequence[Simulation]) -> dict[str, Any]:
    """For a file of JSON."""
    return {
        "figures": [{**asdict(figure), "met": figure.met} for figure in found],
        "series": {
            simulation.policy.name: {
                "hours": simulation.outcome.times,
                "nodes": simulation.outcome.nodes,
                "covered": simulation.outcome.covered,
                "bottleneck": simulation.outcome.bottleneck,
            }
            for simulation in simulations
        },
    }


def draw(simulations: Sequence[Simulation], folder: pathlib.Path) -> list[pathlib.Path]:
    """Coverage, bottleneck and routes as PNG files; returns where they are."""
    from matplotlib.figure import Figure as Picture  # an extra, and slow to import

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, title, series in (
        ("coverage", "Blocks that are served", "covered"),
        ("bottleneck", "The weakest block's throughput, of the bound", "bottleneck"),
    ):
        picture = Picture(figsize=(9, 5), layout="constrained")
        axes = picture.subplots()
        for simulation in simulations:
            outcome = simulation.outcome
            axes.plot(outcome.times, getattr(outcome, series), label=outcome.name)
        axes.axvline(WARM_UP / 3600, linestyle=":", color="grey", label="end of the warm-up")
        axes.set(title=title, xlabel="hours", ylim=(0, 1.05))
        paths.append(_save(picture, axes, folder / f"{name}.png"))
    picture = Picture(figsize=(9, 5), layout="constrained")
    axes = picture.subplots()
    for simulation in simulations:
        ratios = sorted(simulation.outcome.latency)
        shares = [(number + 1) / len(ratios) for number in range(len(ratios))]
        axes.plot(ratios, shares, label=simulation.outcome.name)
    axes.set(
        title="A token's time by the chosen route, of the best there is",
        xlabel="times the best",
        ylabel="of all sessions",
    )
    paths.append(_save(picture, axes, folder / "routes.png"))
    return paths


def _save(picture: Any, axes: Any, path: pathlib.Path) -> pathlib.Path:
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    picture.savefig(path, dpi=120)
    return path
