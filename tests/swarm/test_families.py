"""Real processes serve models of several families, and one dies on the way: the tokens stay.

What is particular to each is tested in one process (``tests/inference/test_families.py``); here, that
all that nodes do beyond computing works for any: a plain one, experts, windows with caps, and one with
attention of its own.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from petals.inference.sampling_params import SamplingParams
from support.processes import ProcessSwarm, originating, run_command, swarm
from support.reference import with_demo_tokenizer
from support.tiny_families import tiny_config, tiny_model

BATCH = (
    "And God said",
    "x",
    "Then went the king of the north out against the city, and there was a great noise",
)
"""The last is longer than the windows, the others are padded."""
PARAMS = SamplingParams(max_new_tokens=32)
TOKENS = 8
"""Before a hop dies."""
SPANS = ("0:1", "1:4", "1:4")
FAMILIES = (
    "Llama, biases, tied, one head of keys, llama3 rotary",
    "Qwen3-MoE, one dense block",
    "Gemma2, soft caps, every second block with a window",
    "Falcon, new architecture",
)
OPTIONS = ("--dtype", "float32", "--throughput", "100")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as running:
        yield running


@pytest.mark.parametrize("name", FAMILIES)
async def test_a_batch_and_a_text_beside_it_over_a_hop_that_dies(
    name: str, processes: ProcessSwarm, tmp_path: Path
) -> None:
    model = with_demo_tokenizer(tmp_path, lambda size: tiny_config(name, vocab_size=size))
    nodes = processes.serve(model.name, *SPANS, options=OPTIONS)
    async with originating(processes, model.name) as node:
        both = [await node.submit(list(texts), PARAMS) for texts in (BATCH, BATCH[2:])]
        async for _ in both[0]:
            if both[0].status().tokens >= TOKENS:
                break
        processes.node(both[0].status().route[-1].peer_id).send_signal(signal.SIGKILL)
        batch, text = [await handle.results() for handle in both]
    assert [list(result.token_ids) for result in batch] == model.generate(BATCH, PARAMS)
    assert [list(result.token_ids) for result in text] == model.generate(BATCH[2:], PARAMS)
    assert batch[0].recoveries == 1
    for process in nodes:
        process.send_signal(signal.SIGTERM)


def test_a_model_that_cannot_be_carried_is_refused_in_words(tmp_path: Path) -> None:
    tiny_model(tiny_config("Llama"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"stablelm"'))
    done = run_command("run", "--model", str(tmp_path), "--blocks", "0:2")
    assert done.returncode != 0
    assert "models of type stablelm cannot be cut into blocks here" in done.stderr
    assert "Traceback" not in done.stderr
