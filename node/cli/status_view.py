"""How ``petals-node status`` looks: per model a headline, a bar of its blocks, a table of its nodes.

Rules of this file: from plain values (``summary.summarise``) to what rich can draw; nothing here asks
anybody. It fits 80 columns, and says all that it says without colour, too. What strangers call
themselves is shown as it is, never as markup.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...protocol.span import Span
from . import originator

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

NOBODY = "No peer serves a model here."
ROOMY = 100
"""Columns from which on prefill speeds are shown as well."""
_LABEL = 10
_STEPS = "▁▂▃▄▅▆▇█"
_TICK = 8
"""Blocks between two numbers above the bar."""
_UNITS = ("", "k", "M", "G", "T")
_STATE_COLOURS = {"online": "green", "joining": "yellow", "draining": "yellow"}


def picture(models: Sequence[dict[str, Any]], width: int) -> "Group":
    """All models, one below the other."""
    from rich.console import Group
    from rich.text import Text

    if not models:
        return Group(Text(NOBODY))
    parts: list[Text | Table] = []
    for model in models:
        parts += [Text()] if parts else []
        parts += [Text(headline(model)), *_bar(model, width), Text(), _table(model, width)]
    return Group(*parts)


def headline(model: dict[str, Any]) -> str:
    """One line about a model: is it whole, and how fast can it be."""
    if model["missing"]:
        spans = ", ".join(str(Span(start, end)) for start, end in model["missing"])
        state = f"cannot run: nobody serves blocks {spans}"
    else:
        state = (
            f"every block served at least {min(model['coverage'])}×, "
            f"up to {figure(min(model['throughput']))} tokens/s"
        )
    return f"{model['model']} ({model['fingerprint'][:8]}): {model['num_blocks']} blocks, {state}"


# --- the bar of blocks ----------------------------------------------------------------------------


def _bar(model: dict[str, Any], width: int) -> list["Text"]:
    """A character for each block, or for a few where there are too many: the weakest counts."""
    from rich.text import Text

    counts: list[int] = model["coverage"]
    speeds: list[float] = model["throughput"]
    each = -(-len(counts) // max(1, width - _LABEL))
    starts = range(0, len(counts), each)
    most = max(speeds)
    nodes, tokens = Text(f"{'nodes':{_LABEL}}"), Text(f"{'tokens/s':{_LABEL}}")
    for start in starts:
        count = min(counts[start : start + each])
        nodes.append(digit(count), style=("red", "yellow")[count] if count < 2 else "green")
        tokens.append(step(min(speeds[start : start + each]), most))
    lines = [Text(f"{'blocks':{_LABEL}}{ruler(len(counts), each)}"), nodes, tokens]
    legend = f"{'':{_LABEL}}{_STEPS[0]}–{_STEPS[-1]} up to {figure(most)} tokens/s"
    if each > 1:
        legend += f"; a character is {each} blocks, the weakest of them counts"
    return [*lines, Text(legend, style="dim")]


def ruler(num_blocks: int, each: int) -> str:
    """Numbers of blocks, every eight characters."""
    ticks = range(0, num_blocks, each * _TICK)
    return "".join(f"{start:<{_TICK}}" for start in ticks).rstrip()


def digit(count: int) -> str:
    """A count in one character."""
    return str(count) if count < 10 else "+"


def step(speed: float, most: float) -> str:
    """A speed in one character; a blank for none at all."""
    if speed <= 0:
        return " "
    return _STEPS[min(len(_STEPS) - 1, int(speed / most * len(_STEPS)))]


# --- the table of nodes ---------------------------------------------------------------------------

_Cell = Callable[[dict[str, Any]], "str | Text"]


def _table(model: dict[str, Any], width: int) -> "Table":
    from rich import box
    from rich.table import Table

    # heading, whether it is a figure, what is in it
    columns: list[tuple[str, bool, _Cell]] = [
        ("node", False, lambda peer: originator.short_peer_id(peer["peer_id"])),
        ("name", False, lambda peer: _line(peer["public_name"] or "")),
        ("blocks", True, lambda peer: "{}:{}".format(*peer["blocks"]) if peer["blocks"] else "-"),
        ("type", False, lambda peer: peer["dtype"]),
        ("tok/s", True, lambda peer: figure(peer["decode_speed"])),
        ("prefill", True, lambda peer: figure(peer["prefill_speed"])),
        ("sessions", True, lambda peer: str(peer["sessions"])),
        ("cache", True, lambda peer: _tokens(peer["cache_tokens_left"])),
        ("version", False, lambda peer: _line(peer["version"])),
        ("state", False, lambda peer: _line(peer["state"], _STATE_COLOURS.get(peer["state"], ""))),
        ("reach", False, lambda peer: peer["reachability"]),
    ]
    hidden = set() if any(peer["public_name"] for peer in model["peers"]) else {"name"}
    if width < ROOMY:
        hidden.add("prefill")
    shown = [column for column in columns if column[0] not in hidden]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    for heading, is_figure, _ in shown:
        # of what others chose, the end is cut off where it does not fit; figures stay whole
        table.add_column(
            heading,
            justify="right" if is_figure else "left",
            no_wrap=heading not in ("name", "version"),
        )
    for peer in model["peers"]:
        table.add_row(*(cell(peer) for _, _, cell in shown))
    return table


def _line(text: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _tokens(count: int) -> str:
    return str(count) if count < 100_000 else figure(count)


def figure(value: float) -> str:
    """A figure in at most four characters and a unit; "-" for what was not measured, or is none."""
    if value <= 0:
        return "-"
    unit = 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value /= 1000
        unit += 1
    return (f"{value:.0f}" if value >= 99.95 else f"{value:.1f}") + _UNITS[unit]
