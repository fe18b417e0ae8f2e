"""Every program in ``examples/`` runs, and writes what transformers writes.

In this process: starting Python with torch costs more than all of them together.
"""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from petals.inference.sampling_params import SamplingParams
from support.processes import ProcessSwarm, swarm
from support.reference import ReferenceModel

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = ("In the beginning", "And God said", "The king")
TESTED = {"script", "embedded_node", "asyncio_stream", "openai_client", "batch_job"}


@pytest.fixture(scope="module")
def served(
    demo: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as processes:
        processes.serve(demo.name, "0:4", "4:8", options=("--api", "127.0.0.1:0"))
        yield processes


class Examples:
    """Runs them as a person does, with the way into the swarm in the environment."""

    def __init__(
        self, address: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._patch = patch
        self._capsys = capsys
        patch.setenv("PETALS_BOOTSTRAP", address)

    def run(self, name: str, *arguments: str) -> list[str]:
        """The lines that it prints."""
        path = EXAMPLES / f"{name}.py"
        self._patch.setattr(sys, "argv", [str(path), *arguments])
        self._capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return self._capsys.readouterr().out.splitlines()


@pytest.fixture
def examples(
    served: ProcessSwarm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Examples:
    monkeypatch.setenv("PETALS_DATA_DIR", str(tmp_path))
    return Examples(served.address, monkeypatch, capsys)


def text(demo: ReferenceModel, prompt: str, max_new_tokens: int) -> str:
    [tokens] = demo.generate((prompt,), SamplingParams(max_new_tokens=max_new_tokens))
    return str(demo.tokenizer.decode(tokens, skip_special_tokens=True))


def test_all_are_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED


def test_script(examples: Examples, demo: ReferenceModel) -> None:
    *written, figures = examples.run("script", PROMPTS[0])
    assert "\n".join(written) == text(demo, PROMPTS[0], 30)
    assert "tokens/s through blocks 0:4 at …" in figures


def test_embedded_node(examples: Examples, demo: ReferenceModel) -> None:
    serving, *lines = examples.run("embedded_node", "--num-blocks", "3")
    assert serving.startswith("serves blocks ")
    lengths = [30 - len(demo.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    assert sorted(lines) == sorted(
        f"{prompt}{text(demo, prompt, length)!r}"
        for prompt, length in zip(PROMPTS, lengths, strict=True)
    )


def test_asyncio_stream(examples: Examples, demo: ReferenceModel) -> None:
    lines = examples.run("asyncio_stream")
    for number, prompt in enumerate(PROMPTS):
        mine = [line for line in lines if line.startswith(f"{number}: ")]
        assert len(mine) > 1
        assert mine[-1] == f"{number}: {prompt}{text(demo, prompt, 20)!r}"


def test_batch_job(examples: Examples, demo: ReferenceModel, tmp_path: Path) -> None:
    prompts, results = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    prompts.write_text("\n".join(PROMPTS[:2]))
    files = (str(prompts), str(results), "--at-once", "2")
    assert examples.run("batch_job", *files) == ["2 written, 0 failed, 0 were there already"]
    prompts.write_text("\n".join(PROMPTS))
    assert examples.run("batch_job", *files) == ["1 written, 0 failed, 2 were there already"]
    written = [json.loads(line) for line in results.read_text().splitlines()]
    assert {line["prompt"]: line["text"] for line in written} == {
        prompt: text(demo, prompt, 20) for prompt in PROMPTS
    }


def test_openai_client(examples: Examples, demo: ReferenceModel, served: ProcessSwarm) -> None:
    url = str(served.nodes[0].event("api")["url"])
    completion, *chat = examples.run("openai_client", "--url", url)
    assert completion.startswith(f"{PROMPTS[0]}'")
    assert "\n".join(chat).strip()
