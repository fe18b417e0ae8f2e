"""What all tests share: how hypothesis draws, and which tests are slow."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Read when torch is imported: models are small here, and processes many.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Nor what a developer has set for the program that is tested.
os.environ["PETALS_CONFIG"] = os.devnull

# Timing on a shared machine says nothing, so no deadlines; in CI the same examples every time.
settings.register_profile(
    "dev", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

_SWARM = Path(__file__).parent / "swarm"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _SWARM in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def logging_stays_as_it_is() -> Iterator[None]:
    """A command that runs in this process sets up what is logged for all of it."""
    root, own = logging.getLogger(), logging.getLogger("petals")
    handlers, levels = list(root.handlers), (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])
