"""The Grafana dashboard in the docs asks for metrics that there are."""

import json
import re
from pathlib import Path
from typing import Any

from petals.node.api import metrics

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"
HISTOGRAMS = ("petals_round_rows", "petals_round_seconds", "petals_step_queue_seconds")
"""Those of an engine; its own test has their names."""


class QuietNode:
    """As much of a node as the metrics ask for, that counts one of everything."""

    peer_id = "12D3KooW"

    def statistics(self) -> dict[str, float]:
        labelled = [f"{name} x" for name in metrics._LABELLED]
        names = [*metrics._GAUGES, *metrics._COUNTERS, *labelled, "block_tokens_per_second decode"]
        return dict.fromkeys(names, 1.0)

    def histograms(self) -> dict[str, Any]:
        return {}


def test_every_metric_of_the_dashboard_exists() -> None:
    node: Any = QuietNode()
    told = metrics.Metrics(node).text().decode()
    there = set(re.findall(r"^# TYPE (\S+)", told, re.MULTILINE)) | set(HISTOGRAMS)
    queries = re.findall(r"petals_\w+", DASHBOARD.read_text())
    asked = {name.removesuffix("_bucket") for name in queries}
    assert len(asked) > 20
    assert asked <= there


def test_no_panel_lies_on_another() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
    assert max(x for x, _ in taken) < 24
