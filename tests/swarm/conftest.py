"""The models that the swarms serve."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import ProcessSwarm, swarm
from support.reference import ReferenceModel, demo_model, random_model


@pytest.fixture(scope="session")
def demo() -> ReferenceModel:
    return demo_model()


@pytest.fixture(scope="session")
def random_bloom(tmp_path_factory: pytest.TempPathFactory) -> ReferenceModel:
    return random_model(tmp_path_factory.mktemp("random-bloom"))


@pytest.fixture
def tmp_swarm(tmp_path: Path) -> Iterator[ProcessSwarm]:
    """A swarm for one test; nobody serves yet."""
    folder = tmp_path / "swarm"
    folder.mkdir()
    with swarm(folder) as processes:
        yield processes
