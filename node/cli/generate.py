"""``petals-node generate``: text to standard output as it comes, everything else to stderr."""

import json
import sys
from functools import partial

import trio

from ...inference.sampling_params import SamplingParams
from ...protocol.errors import ConfigError, PetalsError
from ..config import NodeConfig
from . import failures, leaving, originator


def generate(
    config: NodeConfig,
    prompt: str,
    params: SamplingParams,
    *,
    json_result: bool,
    exit_with_stdin: bool,
) -> int:
    """Generate from one prompt; ``-`` reads it from standard input."""
    if exit_with_stdin:
        leaving.leave_when_stdin_ends()
    elif prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise ConfigError("PROMPT: there is no text to go on from; write at least one character")
    trio.run(partial(_generate, config, prompt, params, json_result=json_result))
    return failures.OK


async def _generate(
    config: NodeConfig, prompt: str, params: SamplingParams, *, json_result: bool
) -> None:
    from ..node import Node

    async with Node(config) as node:
        handle = await node.submit(prompt, params)
        shown = False
        try:
            async for piece in handle:
                _write(piece)
                shown = True
            generation = await handle.result()
        except PetalsError as error:
            if not shown:
                raise
            _write("\n")
            raise failures.CommandFailed(f"the text broke off: {error}") from error
        # Before leaving the swarm, which takes a moment: nobody has to wait for that.
        if not generation.text.endswith("\n"):
            _write("\n")
        if json_result:
            _write(json.dumps(originator.result_record(generation)) + "\n")
        sys.stderr.write(originator.figures(generation) + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
