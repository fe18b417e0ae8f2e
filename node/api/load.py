"""How busy the nodes are, from two looks at what each has counted of itself.

Rules of this file: peers count what they like, and start anew when they are restarted: what two looks
do not make a sane figure of is not told (``None``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, float]

_SHOWN = ("cache_tokens_total", "cache_tokens_used", "steps_queued", "sessions")


@dataclass(frozen=True, slots=True)
class _Look:
    at: float
    figures: Figures


@dataclass(frozen=True, slots=True)
class _Step:
    """A step at a node, on average between two looks in which there was one."""

    wait: float | None
    compute: float | None


class Loads:
    """Of each peer the look before, and what became of it."""

    def __init__(self) -> None:
        self._looks: dict[str, _Look] = {}
        self._steps: dict[str, _Step] = {}

    def update(self, figures: Mapping[str, Figures | None], now: float) -> dict[str, Any]:
        """What is to be shown of each peer; of one that has not answered None."""
        before, self._looks = self._looks, {}
        self._steps = {peer: step for peer, step in self._steps.items() if peer in figures}
        shown: dict[str, Any] = {}
        for peer_id, told in figures.items():
            if told is None:
                shown[peer_id] = None
                continue
            look = self._looks[peer_id] = _Look(now, told)
            earlier = before.get(peer_id)
            shown[peer_id] = {name: told.get(name) for name in _SHOWN}
            shown[peer_id]["busy"] = None if earlier is None else _busy(earlier, look)
            if earlier is not None and _rise(earlier, look, "steps"):
                self._steps[peer_id] = _Step(
                    wait=_mean(earlier, look, "queued_seconds", "steps"),
                    compute=_mean(earlier, look, "busy_seconds", "rounds"),
                )
        return shown

    def of_a_step(self, peer_id: str) -> dict[str, float | None]:
        """Seconds that a step has waited and was computed there lately."""
        step = self._steps.get(peer_id, _Step(None, None))
        return {"wait": step.wait, "compute": step.compute}


def _rise(before: _Look, after: _Look, name: str) -> float:
    """By how much a count has grown; 0 if it is not there, or has begun anew."""
    return max(0.0, after.figures.get(name, 0.0) - before.figures.get(name, 0.0))


def _busy(before: _Look, after: _Look) -> float | None:
    """The share of the time in which it has computed."""
    if "busy_seconds" not in after.figures or after.at <= before.at:
        return None
    return min(1.0, _rise(before, after, "busy_seconds") / (after.at - before.at))


def _mean(before: _Look, after: _Look, total: str, count: str) -> float | None:
    counted = _rise(before, after, count)
    return _rise(before, after, total) / counted if counted and total in after.figures else None
