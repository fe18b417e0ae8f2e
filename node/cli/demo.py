"""``petals-node demo``: a whole swarm in processes on this machine, and a check of its text.

One bootstrap peer, several nodes that each serve a part of the model, and one process that
originates and holds no blocks; then transformers alone, in one more process, from the same prompt.
The process that runs this file only starts the others and tells what they say.
"""

import json
import os
import re
import signal
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from ...inference.hub import open_source
from ...protocol.errors import ConfigError, ModelError
from . import arguments, failures
from .originator import short_peer_id
from .processes import Child, child

_LOOPBACK = "/ip4/127.0.0.1/tcp/0"

_REPETITION_PENALTY = 1.3
"""Greedy text of a small model goes round in circles without."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the demo shows."""

    prompt: str
    max_new_tokens: int
    nodes: int
    model: str

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("--prompt: there is no text to go on from")
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"--max-new-tokens: {self.max_new_tokens} is too few; write a number from 1 upwards"
            )
        if self.nodes < 1:
            raise ConfigError(f"--nodes: {self.nodes} is too few; write a number from 1 upwards")

    @property
    def originating(self) -> list[str]:
        """The options that the swarm and transformers are given alike."""
        return [
            "--model",
            self.model,
            "--max-new-tokens",
            str(self.max_new_tokens),
            "--repetition-penalty",
            str(_REPETITION_PENALTY),
        ]


def demo(*, prompt: str, max_new_tokens: int, nodes: int, model: str) -> int:
    """Run the demo; 0 if the swarm's text is transformers', 1 if not."""
    plan = Plan(prompt, max_new_tokens, nodes, model)
    return trio.run(_until_signal, plan)


async def _until_signal(plan: Plan) -> int:
    """Run the demo unless a signal ends it first; its processes are gone either way."""
    code = failures.FAILED
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal code
                async for number in signals:
                    code = 128 + number
                    _say("\nInterrupted: ending the processes …")
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            same = await _run(plan)
            code = failures.OK if same else failures.FAILED
            nursery.cancel_scope.cancel()
    return code


async def _run(plan: Plan) -> bool:
    started = time.monotonic()
    spans = arguments.split_evenly(_num_blocks(plan.model), plan.nodes)
    _say(
        f"A swarm on this machine: a bootstrap peer, {plan.nodes} processes that serve "
        f"{plan.model}, and one that originates.\n"
    )
    with TemporaryDirectory(prefix="petals-demo-") as folder:
        async with AsyncExitStack() as stack:
            children: list[Child] = []
            threads = {"OMP_NUM_THREADS": str(threads_each(plan.nodes))}

            async def start(name: str, *options: str) -> Child:
                running = await stack.enter_async_context(child(name, options, threads))
                children.append(running)
                return running

            async def run(name: str, *options: str) -> Child:
                data_dir = str(Path(folder, name.replace(" ", "-")))
                always = ("--json", "--listen", _LOOPBACK, "--data-dir", data_dir)
                return await start(name, "run", *always, *options)

            def tell_all_to_leave() -> None:
                for running in children:
                    running.tell_to_leave()

            bootstrap = await run("bootstrap peer")
            address = (await bootstrap.wait_for("serving"))["multiaddr"]
            _say(f"bootstrap peer  process {bootstrap.pid}  {address}")

            names: dict[str, str] = {}
            servers = [
                await run(
                    f"node {number}",
                    *("--bootstrap", address, "--model", plan.model, "--blocks", str(span)),
                    *("--dtype", "float32"),
                )
                for number, span in enumerate(spans, start=1)
            ]
            stack.callback(tell_all_to_leave)  # at once; then each is waited for
            async with trio.open_nursery() as nursery:
                for server in servers:
                    nursery.start_soon(_announce_when_serving, server, names)
            _say(f"All serve after {time.monotonic() - started:.1f} s.\n")

            result = await _originate(start, address, plan)
            _say_how_it_went(result, names)
    reference = await _ask_transformers(plan)
    return compare(result, reference)


def _num_blocks(model: str) -> int:
    """How many blocks the model has, from its config alone: this process needs no torch."""
    source = open_source(model, cache_dir=None)
    path = source.find("config.json")
    if path is None:
        raise ModelError(f"{model}: {source.missing('config.json')}")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    for key in ("num_hidden_layers", "n_layer"):
        if isinstance(config.get(key), int):
            count: int = config[key]
            return count
    raise ModelError(f"{model}: config.json does not say how many blocks the model has")


def threads_each(nodes: int) -> int:
    """Threads a process, so that all of them together have the cores once."""
    return max(1, (os.cpu_count() or 1) // nodes)


async def _announce_when_serving(server: Child, names: dict[str, str]) -> None:
    event = await server.wait_for("serving")
    start, end = event["blocks"]
    names[event["peer_id"]] = server.name
    _say(
        f"{server.name}  process {server.pid}  serves blocks {start}:{end} of {event['model']}  "
        f"peer {short_peer_id(event['peer_id'])}"
    )


async def _originate(start: Any, address: str, plan: Plan) -> dict[str, Any]:
    """Generate from one more process; its text is shown as it comes."""
    originator: Child = await start(
        "originator",
        *("generate", plan.prompt, "--json", "--bootstrap", address, "--dtype", "float32"),
        *plan.originating,
    )
    _say(f"originator  process {originator.pid}  holds no blocks; it goes on from the prompt:\n")
    _show(plan.prompt)
    splitter = TextThenResult()
    async for output in originator.output():
        _show(splitter.feed(output))
    await originator.check_ended_well()
    return splitter.result()


class TextThenResult:
    """Takes apart what ``generate --json`` writes: text as it comes, then one line of JSON.

    A line that may be the JSON is held back until something follows it.
    """

    def __init__(self) -> None:
        self._held = ""
        self._at_line_start = True

    def feed(self, output: str) -> str:
        """Take output in any pieces; return the text that is now known to be text."""
        text = ""
        for part in re.findall(r"[^\n]*\n|[^\n]+", output):
            if self._held.endswith("\n"):
                text += self._held
                self._held = ""
            if self._held or (self._at_line_start and part.startswith("{")):
                self._held += part
            else:
                text += part
            self._at_line_start = part.endswith("\n")
        return text

    def result(self) -> dict[str, Any]:
        """The JSON object, once the output has ended."""
        result: dict[str, Any] = json.loads(self._held)
        return result


async def _ask_transformers(plan: Plan) -> dict[str, Any]:
    _say("\nThe same prompt in one process, with transformers alone …")
    async with child("transformers", ["reference", plan.prompt, *plan.originating], {}) as running:
        text = "".join([piece async for piece in running.output()])
        await running.check_ended_well()
    reference: dict[str, Any] = json.loads(text.splitlines()[-1])
    return reference


def _say_how_it_went(result: dict[str, Any], names: dict[str, str]) -> None:
    route = " → ".join(
        f"{names.get(hop['peer_id'], short_peer_id(hop['peer_id']))} "
        f"({hop['blocks'][0]}:{hop['blocks'][1]})"
        for hop in result["route"]
    )
    _say(f"\nroute: originator → {route} → originator")
    _say(
        f"{len(result['token_ids'])} tokens, {result['tokens_per_second']:.1f} tokens/s, "
        f"time to first token {result['time_to_first_token']:.2f} s"
    )


def compare(result: dict[str, Any], reference: dict[str, Any]) -> bool:
    """Say whether the swarm's text is transformers', token for token."""
    ours, theirs = result["token_ids"], reference["token_ids"]
    if ours == theirs:
        _say(f"The text is the same, token for token ({len(ours)} tokens).")
        return True
    first = next(
        (index for index, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    _say(f"The text DIFFERS from token {first + 1} on. transformers wrote:\n{reference['text']}")
    return False


def _say(line: str) -> None:
    _show(line + "\n")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
