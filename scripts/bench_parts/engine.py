"""``scripts/bench engine``: what one process does."""

from __future__ import annotations

from collections.abc import Sequence

from . import arrival, decode_bound, decode_text, large_block, sessions, shared_prefix
from .report import Report
from .settings import Settings

PARTS = {
    "bound": decode_bound.measure,
    "text": decode_text.measure,
    "sessions": sessions.measure,
    "arrival": arrival.measure,
    "shared-prefix": shared_prefix.measure,
    "large-block": large_block.measure,
}


def run(settings: Settings, report: Report, parts: Sequence[str] | None) -> None:
    """Measure ``parts``, or all of them."""
    for part in parts or PARTS:
        if part not in PARTS:
            raise SystemExit(f"--part: {part} is none of {', '.join(PARTS)}")
        report.say(f"— {part}")
        PARTS[part](settings, report)
