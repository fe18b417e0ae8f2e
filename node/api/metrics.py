"""``/metrics``: the figures of this node and of the texts that it has been asked for, for Prometheus.

What the node counts anyway (``Node.statistics``, its engine's histograms) is read when somebody asks; what
only the API knows is counted here.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ... import __version__

if TYPE_CHECKING:
    from ..generation import GenerationHandle
    from ..node import Node

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)

_GAUGES = {
    "connections": "Connections with peers.",
    "streams": "Open streams.",
    "generations": "Texts of this node's own that are being generated.",
    "tasks": "Tasks of the event loop.",
    "sessions": "Sessions of peers that pass through this node.",
    "engine_sessions": "Sessions that hold cache.",
    "cache_tokens_total": "Tokens that the KV cache has room for.",
    "cache_tokens_used": "Tokens of it that sessions have reserved.",
    "steps_queued": "Steps that wait to be computed, or are.",
    "prefix_tokens": "Tokens kept of sessions that have ended.",
}
_COUNTERS = {
    "steps": "Steps computed for sessions.",
    "rounds": "Batches in which they were.",
    "rows": "Rows (tokens of one sequence) computed.",
    "busy_seconds": "Seconds spent computing them.",
    "prefix_hits": "Sessions that began with rows that were here.",
    "prefix_tokens_reused": "Rows that they did not have to compute.",
}
_LABELLED = {
    "bytes_sent": ("petals_bytes_sent", "protocol", "Bytes sent to peers."),
    "bytes_received": ("petals_bytes_received", "protocol", "Bytes received from peers."),
    "refused": ("petals_refused_sessions", "reason", "Sessions of peers that were refused."),
}
"""Figures called ``NAME LABEL``."""


def families(figures: Mapping[str, float]) -> Iterator[Metric]:
    """A node's statistics as Prometheus wants them."""
    for name, help_text in _GAUGES.items():
        if name in figures:
            yield GaugeMetricFamily(f"petals_{name}", help_text, figures[name])
    for name, help_text in _COUNTERS.items():
        if name in figures:
            yield CounterMetricFamily(f"petals_{name}", help_text, figures[name])
    speed = GaugeMetricFamily(
        "petals_block_tokens_per_second", "Measured speed of one block.", labels=["kind"]
    )
    counted = {
        prefix: CounterMetricFamily(name, help_text, labels=[label])
        for prefix, (name, label, help_text) in _LABELLED.items()
    }
    for figure, value in figures.items():
        prefix, _, label = figure.partition(" ")
        if prefix in counted:
            counted[prefix].add_metric([label], value)
        elif prefix == "block_tokens_per_second":
            speed.add_metric([label], value)
    yield from counted.values()
    yield speed


class _NodeCollector(Collector):
    """Asks the node when it is asked."""

    def __init__(self, node: "Node") -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        """What it counts at the moment."""
        yield InfoMetricFamily(
            "petals_node",
            "This node.",
            {"version": __version__, "peer_id": self._node.peer_id},
        )
        yield from families(self._node.statistics())
        for name, histogram in self._node.histograms().items():
            yield HistogramMetricFamily(
                f"petals_{name}",
                histogram.meaning,
                buckets=[(floatToGoString(bound), count) for bound, count in histogram.buckets],
                sum_value=histogram.total,
            )


class Metrics:
    """What one API has done, and its node."""

    def __init__(self, node: "Node") -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_NodeCollector(node))
        self.requests = Counter(
            "petals_api_requests",
            "Requests answered.",
            ["path", "status"],
            registry=self._registry,
        )
        self.running = Gauge(
            "petals_api_requests_running", "Requests in work.", registry=self._registry
        )
        self._generations = Counter(
            "petals_api_generations",
            "Sessions for requests, by how they ended.",
            ["state"],
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "petals_api_prompt_tokens", "Tokens of prompts.", registry=self._registry
        )
        self._new_tokens = Counter(
            "petals_api_generated_tokens", "Tokens generated.", registry=self._registry
        )
        self._recoveries = Counter(
            "petals_api_recoveries", "Hops replaced meanwhile.", registry=self._registry
        )
        self._first_token = Histogram(
            "petals_api_time_to_first_token_seconds",
            "From the request to the first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._token = Histogram(
            "petals_api_token_seconds",
            "Between two tokens, on average over a text.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self._registry)

    def ended(self, handle: "GenerationHandle", prompt_tokens: int) -> None:
        """Count a generation that has ended, or that nobody waits for any more."""
        status = handle.status()
        self._generations.labels(status.state.value if status.state.final else "cancelled").inc()
        self._recoveries.inc(status.recoveries)
        self._prompt_tokens.inc(prompt_tokens)
        generations = handle.partial()
        self._new_tokens.inc(sum(len(generation.token_ids) for generation in generations))
        if status.tokens:
            self._first_token.observe(generations[0].time_to_first_token)
        if status.tokens > 1 and status.tokens_per_second > 0:
            self._token.observe(1 / status.tokens_per_second)
