"""What a benchmark found: rows, with what they are compared to; as tables, JSON and pictures."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table

NUMBER_DIGITS = 4  # significant ones


@dataclass(frozen=True)
class Aim:
    """Within what a row's ratio should be."""

    at_least: float | None = None
    at_most: float | None = None

    def met(self, ratio: float) -> bool:
        """Whether ``ratio`` is within."""
        return (self.at_least is None or ratio >= self.at_least) and (
            self.at_most is None or ratio <= self.at_most
        )

    def __str__(self) -> str:
        bounds = [("≥", self.at_least), ("≤", self.at_most)]
        return ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


@dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    value: float
    unit: str
    against: str = ""
    """What it is compared to: the rival's or the bound's name, and its figure."""
    ratio: float | None = None
    """How it compares; the better, the higher, unless the row has an aim that is an upper bound."""
    aim: Aim | None = None

    @property
    def met(self) -> bool | None:
        """Whether the ratio is as it should be; None for a row without an aim."""
        return None if self.aim is None or self.ratio is None else self.aim.met(self.ratio)

    @property
    def aim_text(self) -> str:
        """The aim, with a mark that says whether it is met."""
        mark = {None: "", True: " ✓", False: " ✗"}[self.met]
        return f"{self.aim or ''}{mark}"


@dataclass(frozen=True)
class Curve:
    """One line of a picture."""

    label: str
    points: Mapping[float, float]
    """y by x."""
    bound: bool = False
    """What the curve of the same label cannot be better than."""


@dataclass(frozen=True)
class Picture:
    """A picture to be drawn; both axes are logarithmic, to the base 2 where x doubles."""

    filename: str
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Summary:
    """Figures of several contestants side by side, as a README shows them."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown, its title above it."""
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"{self.title}\n\n{table}\n"


class Report:
    """Takes rows as they are found, so that a run that breaks off has told what it knew."""

    def __init__(self, subcommand: str, console: Console | None = None) -> None:
        self.subcommand = subcommand
        self.rows: list[Row] = []
        self.pictures: list[Picture] = []
        self.summaries: list[Summary] = []
        self._progress = Console(stderr=True) if console is None else console

    def add(self, row: Row) -> None:
        """Take a row, and show it."""
        self.rows.append(row)
        ratio = "" if row.ratio is None else f"  ratio {number(row.ratio)} {row.aim_text}"
        self._progress.print(
            f"  {row.name}: {number(row.value)} {row.unit}"
            f"{f'  ({row.against})' if row.against else ''}{ratio}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def ahead(
        self,
        name: str,
        ours: float,
        unit: str,
        rival: str,
        theirs: float,
        at_least: float | None = None,
    ) -> None:
        """Take a figure of which more is better, beside a rival's; the ratio is ours by theirs."""
        aim = None if at_least is None else Aim(at_least=at_least)
        self.add(Row(name, ours, unit, f"{rival}: {number(theirs)}", ours / theirs, aim))

    def say(self, line: str) -> None:
        """Tell the person who waits what is being done."""
        self._progress.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """All rows, to be printed."""
        table = Table(title=f"scripts/bench {self.subcommand}", title_justify="left")
        table.add_column("name", overflow="fold")
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("unit", overflow="fold")
        table.add_column("against", overflow="fold")
        table.add_column("ratio", justify="right", no_wrap=True)
        table.add_column("aim", no_wrap=True)
        for row in self.rows:
            style = {None: None, True: "green", False: "red"}[row.met]
            ratio = "" if row.ratio is None else number(row.ratio)
            cells = (row.name, number(row.value), row.unit, row.against, ratio, row.aim_text)
            table.add_row(*map(escape, cells), style=style)
        return table

    def json(self) -> str:
        """The rows as JSON: a list of objects with exactly name, value, unit, against, ratio."""
        return json.dumps(
            [
                {
                    "name": row.name,
                    "value": row.value,
                    "unit": row.unit,
                    "against": row.against,
                    "ratio": row.ratio,
                }
                for row in self.rows
            ],
            indent=1,
            ensure_ascii=False,
        )

    def markdown(self) -> str:
        """The rows as a table in Markdown, and the summaries behind it."""
        lines = ["| name | value | against | ratio | aim |", "|---|---:|---|---:|---|"]
        for row in self.rows:
            ratio = "" if row.ratio is None else number(row.ratio)
            value = f"{number(row.value)} {row.unit}"
            lines.append(f"| {row.name} | {value} | {row.against} | {ratio} | {row.aim_text} |")
        return "\n".join(["\n".join(lines) + "\n", *(one.markdown() for one in self.summaries)])

    def draw(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Draw the pictures as PNG files in ``folder``; returns where they are."""
        if not self.pictures:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        return [_draw(picture, folder / picture.filename) for picture in self.pictures]


def number(value: float) -> str:
    """A figure for people: four significant digits, thousands apart."""
    if value == int(value) and abs(value) < 10**15:
        return f"{int(value):,}"
    if abs(value) < 0.001:
        return f"{value:.2e}"
    if abs(value) < 1:
        return f"{value:.{NUMBER_DIGITS}g}"
    return f"{value:,.{max(0, NUMBER_DIGITS - len(str(int(abs(value)))))}f}"


def header(bandwidth: float | None) -> str:
    """What the figures were measured with; ``bandwidth`` in bytes per second."""
    now = datetime.datetime.now(tz=datetime.UTC)
    measured = "" if bandwidth is None else f", memory bandwidth {bandwidth / 1e9:.1f} GB/s"
    return (
        f"{now:%Y-%m-%d %H:%M} UTC; {cpu_name()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads{measured}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def cpu_name() -> str:
    """The processor, as it calls itself, and the instructions that matter to a matrix product."""
    name, flags = platform.processor() or platform.machine(), ""
    path = pathlib.Path("/proc/cpuinfo")
    if path.exists():
        lines = [line.split(":", 1) for line in path.read_text().splitlines() if ":" in line]
        fields = {name.strip(): value.strip() for name, value in lines}
        name, flags = fields.get("model name", name), fields.get("flags", "")
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    found = [flag for flag in known if flag in flags.split()]
    return f"{name} ({', '.join(found)})" if found else name


def _draw(picture: Picture, path: pathlib.Path) -> pathlib.Path:
    from matplotlib.figure import Figure  # an extra, and slow to import

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    colours: dict[str, Any] = {}
    for curve in picture.curves:
        xs = sorted(curve.points)
        ys = [curve.points[x] for x in xs]
        (line,) = axes.plot(
            xs,
            ys,
            "--" if curve.bound else "o-",
            color=colours.get(curve.label),
            label=f"{curve.label}: bound" if curve.bound else curve.label,
        )
        colours[curve.label] = line.get_color()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({x for curve in picture.curves for x in curve.points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(lambda y, _: f"{y:g}")
    axes.set(title=picture.title, xlabel=picture.x_label, ylabel=picture.y_label)
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)
    return path
