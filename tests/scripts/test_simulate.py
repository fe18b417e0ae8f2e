"""The simulation: its parts on worlds that one can see through, and a whole run of a small swarm."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from petals.protocol.upkeep import upkeep
from simulate_parts.policies import Ours, Petals, PetalsReading, best_start
from simulate_parts.population import GROWTH, NUM_BLOCKS, Population, draw_population
from simulate_parts.records import Records, full
from simulate_parts.routes import best_seconds
from simulate_parts.simulation import Simulation
from simulate_parts.state import GONE, ONLINE, State

SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate"
DEADLINE = 300


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def population(nodes: int, *, hours: float = 2.0, churn: float = 0.2, seed: int = 1) -> Population:
    return draw_population(nodes, hours, churn, np.random.default_rng(seed))


def standing(nodes: int) -> State:
    """Nodes that serve anything, at random."""
    people = population(nodes, churn=0.0)
    state = State(people)
    dice = np.random.default_rng(2)
    state.start[:] = dice.integers(0, NUM_BLOCKS - people.length + 1)
    state.status[:] = ONLINE
    return state


def test_the_population_is_the_same_for_the_same_seed_and_keeps_its_size() -> None:
    one, same, other = population(500), population(500), population(500, seed=2)
    assert (one.goes == same.goes).all()
    assert (one.speed[:500] != other.speed[:500]).any()
    assert (one.comes[:500] <= GROWTH).all()
    there = (one.comes <= 7200) & (one.goes > 7200)
    assert there.sum() == pytest.approx(500, rel=0.15)


def test_latencies_are_those_of_a_globe() -> None:
    people = population(100)
    assert (people.between == people.between.T).all()
    assert people.between.max() < 0.2
    assert people.latency(3, 3) == 0.0
    assert people.latency(3, 4) == pytest.approx(people.latency(4, 3))


@pytest.mark.parametrize("nodes", [20, 8000])
def test_a_reading_shows_everybody_in_a_small_swarm_and_a_bounded_sample_of_a_large_one(
    nodes: int,
) -> None:
    state = standing(nodes)
    records = Records(state, np.random.default_rng(3))
    seen, sizes = records.regions(7200.0, upkeep(nodes))
    if nodes == 20:
        assert seen.tolist() == list(range(20))
    else:
        assert sizes == [full(0)] * len(sizes)
        assert 3000 < len(seen) < 6000


def test_who_crashed_is_believed_in_until_it_expires_and_who_left_is_not() -> None:
    state = standing(3)
    state.status[:2] = GONE
    state.died[0] = 7000.0
    records = Records(state, np.random.default_rng(3))
    assert records.regions(7001.0, upkeep(3))[0].tolist() == [0, 2]
    assert records.regions(7061.0, upkeep(3))[0].tolist() == [2]


def test_the_best_route_is_that_of_trying_all() -> None:
    state = standing(4)
    people = state.population
    state.start[:] = (0, 0, 30, 40)
    people.length[:] = (40, 35, 40, 30)

    def seconds(first: int, second: int, switch: int) -> float:
        ways = people.latency(0, first) + people.latency(first, second) + people.latency(second, 0)
        computing = switch / people.speed[first] + (NUM_BLOCKS - switch) / people.speed[second]
        return float(ways + computing)

    tried = [
        seconds(first, second, switch)
        for first, second, switch in product((0, 1), (2, 3), range(NUM_BLOCKS))
        if state.start[second] <= switch <= people.length[first]
    ]
    found = best_seconds(state, np.arange(4), 0)
    assert found == pytest.approx(min(tried))
    assert best_seconds(state, np.arange(4), 0, star=True) >= found


def test_petals_rule_takes_the_run_whose_sorted_throughputs_come_first() -> None:
    dice = np.random.default_rng(5)
    for _ in range(20):
        throughput = dice.integers(1, 4, NUM_BLOCKS).astype(float)
        runs = [sorted(throughput[start : start + 9].tolist()) for start in range(NUM_BLOCKS - 8)]
        assert runs[best_start(throughput, 9)] == min(runs)


def test_a_simulation_is_the_same_again() -> None:
    people = population(60, hours=1.2)
    runs = [Simulation(people, Ours, hours=1.2, seed=4).run() for _ in range(2)]
    assert runs[0].bottleneck == runs[1].bottleneck
    assert runs[0].latency == runs[1].latency
    assert runs[0].moves == runs[1].moves


def test_all_policies_place_within_the_model() -> None:
    people = population(60, hours=1.2)
    for policy in (Ours, Petals, PetalsReading):
        simulation = Simulation(people, policy, hours=1.2, seed=4)
        simulation.run()
        state = simulation.state
        there = state.there()
        assert (state.start[there] >= 0).all()
        assert (state.start[there] + people.length[there] <= NUM_BLOCKS).all()
        assert (state.session_blocks >= 0).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "0"], "--nodes must be from 1 to 10000"),
        (["--churn", "2"], "--churn must be from 0 to 1"),
        (["--hours", "1"], "the first hour is the warm-up"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments: list[str], said: str) -> None:
    done = simulate(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.slow
def test_two_hundred_nodes_under_churn(tmp_path: Path) -> None:
    file, pictures = tmp_path / "all.json", tmp_path / "pictures"
    options = ("--nodes", "200", "--hours", "2", "--seed", "1")
    done = simulate(*options, "--json", str(file), "--pictures", str(pictures))
    assert done.returncode == 0, done.stderr
    assert "weakest block's throughput" in done.stdout
    found = {row["name"]: row for row in json.loads(file.read_text())["figures"]}
    served = found["time in which every block is served, %"]
    assert (served["ours"], served["rivals"]) == (100, [100, 100])
    bottleneck = found["weakest block's throughput, of the bound: median"]
    # of a bound that so few nodes cannot reach; 0.89 to 0.92 with seeds 1 to 5, Petals' rules alike
    assert bottleneck["ours"] >= 0.85
    assert found["a token's time, of the best route's: median"]["ours"] <= 1.1
    assert found["moves of a node in a day"]["ours"] <= 2
    assert found["sessions without a route"]["ours"] == 0
    names = sorted(path.name for path in pictures.iterdir())
    assert names == ["bottleneck.png", "coverage.png", "routes.png"]
