"""What was generated is not lost: with the originator's own death, or when nobody serves for too long.

Whatever breaks off goes on from a file to the text that nothing has disturbed, token for token.
"""

import dataclasses
import json
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import petals
import pytest
import trio
from petals.inference.sampling_params import SamplingParams
from petals.node import saved_session
from petals.node.generation import GenerationHandle, GenerationState
from petals.protocol.errors import ConfigError, NoRoute
from support.processes import (
    COMMAND,
    DEADLINE,
    ProcessSwarm,
    environment,
    originating,
    run_command,
    swarm,
)
from support.proxies import proxies
from support.reference import ReferenceModel

PROMPT = "And it came to pass in those days"
FOUR = (PROMPT, "The king", "Who art thou, lord of the house?", "In the beginning was a word")
GREEDY = SamplingParams(max_new_tokens=40)
SEEDED = SamplingParams(max_new_tokens=40, temperature=0.8, top_p=0.95, seed=11)
UNSEEDED = dataclasses.replace(SEEDED, seed=None)
LONG = SamplingParams(max_new_tokens=300, temperature=0.8, seed=7)
HALVES = ("0:4", "4:8")
WHOLE = "0:8"
DELAY = 0.005
"""Seconds on the way to a node: no process comes to the end of 300 tokens before it has written some
to its file, which it does once a second."""


@pytest.fixture(scope="module")
def processes(
    random_bloom: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as running:
        running.serve(random_bloom.name, *HALVES)
        yield running


async def until(condition: Callable[[], bool]) -> None:
    """Until it holds; what it looks at wakes nobody."""
    with trio.fail_after(DEADLINE):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


def has_tokens(handle: GenerationHandle, tokens: int) -> bool:
    """Whether so many have been generated."""
    return handle.status().tokens >= tokens


def in_the_middle(file: Path) -> bool:
    """Whether the file has some of a text, and not all."""
    saved = saved_session.load(file) if file.exists() else None
    if saved is None or saved.writing is None:
        return False
    assert saved.unfinished, "too late"
    return saved.length >= saved.writing.begin + 5


async def test_generate_is_killed(
    random_bloom: ReferenceModel, tmp_swarm: ProcessSwarm, tmp_path: Path
) -> None:
    model, file = random_bloom, tmp_path / "text"
    options = ("--temperature", "0.8", "--seed", "7", "--resume", str(file))
    async with proxies(*HALVES, delay=DELAY) as behind:
        await trio.to_thread.run_sync(tmp_swarm.serve_behind, behind, model.name)
        killed = tmp_swarm.generate(model.name, PROMPT, "--max-new-tokens", "300", *options)
        await until(lambda: in_the_middle(file) or not killed.running)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL, killed.errors

        arguments = ("generate", "--json", "--bootstrap", tmp_swarm.address, "--resume", str(file))
        done = await trio.to_thread.run_sync(lambda: run_command(*arguments))
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    result = json.loads(last)
    assert [result["token_ids"]] == model.generate((PROMPT,), LONG)
    assert done.stdout.startswith(result["text"])
    assert f"Going on from {file}, with " in done.stderr


def test_a_program_without_trio(
    random_bloom: ReferenceModel, processes: ProcessSwarm, tmp_path: Path
) -> None:
    """A file holds the whole text in the end; one of another model is refused."""
    kept, saved, foreign = (tmp_path / name for name in ("kept", "saved", "foreign"))
    with petals.connect(random_bloom.name, [processes.address], dtype="float32") as client:
        handle = client.submit(PROMPT, max_new_tokens=40, save_to=kept)
        handle.save(saved)
        text = handle.result().text
        assert [saved_session.load(kept).unfinished, saved_session.load(saved).unfinished] == [0, 1]
        assert client.resume(saved, save_to=saved).result().text == text
        assert saved_session.load(saved) == saved_session.load(kept)
        assert client.resume(kept).result().text == text
        other = dataclasses.replace(saved_session.load(kept), model="another", fingerprint="f00d")
        saved_session.save(foreign, other)
        with pytest.raises(ConfigError, match=r"with the model another \(fingerprint f00d\)"):
            client.resume(foreign)


async def test_chat_is_killed_in_the_middle_of_an_answer(
    random_bloom: ReferenceModel, tmp_swarm: ProcessSwarm, tmp_path: Path
) -> None:
    model, file = random_bloom, tmp_path / "conversation"
    turns = ("Who art thou, lord of the house?", "And whence comest thou?")
    history: list[int] = []
    answers = []
    for turn in turns:
        history += model.tokenizer(turn + "\n")["input_ids"]
        answers.append(model.generate_from(history, LONG))
        history += answers[-1]

    options = ("chat", "--bootstrap", tmp_swarm.address, "--resume", str(file))
    sampling = ("--max-new-tokens", "300", "--temperature", "0.8", "--seed", "7")
    async with proxies(*HALVES, delay=DELAY) as behind, trio.open_nursery() as nursery:
        await trio.to_thread.run_sync(tmp_swarm.serve_behind, behind, model.name)
        chat = await nursery.start(
            partial(
                trio.run_process,
                [*COMMAND, *options, "--model", model.name, *sampling],
                stdin=f"{turns[0]}\n".encode(),
                env=environment(),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        )
        await until(lambda: in_the_middle(file) or chat.returncode is not None)
        chat.kill()
        await until(lambda: chat.returncode is not None)
        assert chat.returncode == -signal.SIGKILL

        done = await trio.to_thread.run_sync(lambda: run_command(*options, text=turns[1] + "\n"))
    assert done.returncode == 0, done.stderr
    texts = [model.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    assert done.stdout == "".join(text if text.endswith("\n") else text + "\n" for text in texts)
    assert f"tokens.\n{turns[0]}\n" in done.stderr  # where the conversation was
    assert saved_session.load(file).token_ids == (tuple(history),)


async def test_a_text_saved_anywhere_becomes_what_it_would_have_become(
    random_bloom: ReferenceModel, processes: ProcessSwarm, tmp_path: Path
) -> None:
    """Also without a seed: the dice go on from where they were."""
    async with originating(processes, random_bloom.name) as node:

        async def save_now_and_then(prompts: tuple[str, ...], params: SamplingParams) -> None:
            handle = await node.submit(prompts, params)
            files = [tmp_path / f"{len(prompts)} {params} {tokens}" for tokens in (1, 20)]
            for file, tokens in zip(files, (1, 20), strict=True):
                await until(partial(has_tokens, handle, tokens))
                await handle.save(file)
            whole = [result.token_ids for result in await handle.results()]
            for file in files:
                results = await (await node.resume(file, prompt=PROMPT)).results()
                assert [result.token_ids for result in results] == whole
                with pytest.raises(
                    ConfigError, match="PROMPT: the saved session began with another"
                ):
                    await node.resume(file, prompt=FOUR[1])

        async with trio.open_nursery() as nursery:
            for params in (GREEDY, SEEDED, UNSEEDED):
                nursery.start_soon(save_now_and_then, (PROMPT,), params)
                nursery.start_soon(save_now_and_then, FOUR, params)


async def test_a_write_that_is_cancelled_again_and_again_goes_on(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    """Wherever that is: between two tokens, on the way around, or while one is sampled."""
    new: list[int] = []
    said = random_bloom.tokenizer(PROMPT)["input_ids"]
    scope = trio.CancelScope()

    def take(tokens: list[int]) -> list[bool]:
        new.extend(tokens)
        if len(new) % 8 == 0:
            scope.cancel()
        return [False]

    def longer_than(tokens: int) -> bool:
        return len(new) > tokens or not session.unfinished

    async with originating(processes, random_bloom.name) as node, node.open_session(100) as session:
        with scope:
            await session.write([said], SEEDED, take)
        while session.unfinished:
            async with trio.open_nursery() as nursery:
                scope, tokens = nursery.cancel_scope, len(new)
                nursery.start_soon(session.go_on, take)
                await until(partial(longer_than, tokens))
                scope.cancel()
        assert session.token_ids == [[*said, *new]]
    assert [new] == random_bloom.generate((PROMPT,), SEEDED)


async def test_nobody_serves_for_longer_than_patience(
    random_bloom: ReferenceModel, tmp_swarm: ProcessSwarm, tmp_path: Path
) -> None:
    """Everything is kept: in the handle, in the session, in a file, and at the command line."""
    model, tokenizer = random_bloom, random_bloom.tokenizer
    file, session_file, command_file = (tmp_path / name for name in ("text", "session", "command"))
    said, four = tokenizer(PROMPT)["input_ids"], dataclasses.replace(SEEDED, max_new_tokens=150)
    new: list[int] = []

    def take(tokens: list[int]) -> list[bool]:
        new.extend(tokens)
        return [False]

    async with (
        proxies(WHOLE, delay=DELAY) as behind,
        originating(tmp_swarm, model.name, patience=0.0) as hasty,
        originating(tmp_swarm, model.name, patience=DEADLINE) as patient,
        hasty.open_session(500) as session,
    ):
        [only] = await trio.to_thread.run_sync(tmp_swarm.serve_behind, behind, model.name)
        command = tmp_swarm.generate(
            model.name, PROMPT, "--max-new-tokens", "400", "--resume", str(command_file)
        )
        await until(lambda: in_the_middle(command_file))
        fails = await hasty.submit(FOUR, four)
        waits = await patient.submit(FOUR, four)
        await until(lambda: has_tokens(fails, 5) and has_tokens(waits, 5))

        async with trio.open_nursery() as nursery:

            async def write() -> None:
                with pytest.raises(NoRoute, match=WHOLE):
                    await session.write([said], LONG, take)

            nursery.start_soon(write)
            await until(lambda: len(new) >= 5)
            only.send_signal(signal.SIGKILL)
        with pytest.raises(NoRoute, match=WHOLE):
            await fails.result()
        await fails.save(file)
        await session.save(session_file)
        assert fails.status().state is GenerationState.FAILED
        assert all(len(result.token_ids) >= 5 for result in fails.partial())
        assert saved_session.load(session_file).token_ids == ((*said, *new),)
        await until(lambda: WHOLE in (waits.status().waiting_for or ""))
        await until(lambda: "Waiting, for 120 s at most: " in command.errors)

        await trio.to_thread.run_sync(tmp_swarm.serve, model.name, WHOLE)
        expected = model.generate(FOUR, four)
        assert [list(result.token_ids) for result in await waits.results()] == expected
        assert waits.status().waiting_for is None
        resumed = await hasty.resume(file)
        assert [list(result.token_ids) for result in await resumed.results()] == expected
        await session.go_on(take)
        assert [new] == model.generate((PROMPT,), LONG)
        assert await trio.to_thread.run_sync(command.wait) == 0, command.errors
        assert "Going on, after " in command.errors
