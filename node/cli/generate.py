"""``petals-node generate``: text to standard output as it comes, everything else to stderr."""

import json
import sys
from typing import TYPE_CHECKING

import trio

from ...inference.sampling_params import SamplingParams
from ...protocol.errors import ConfigError, PetalsError
from ..config import NodeConfig
from . import failures, leaving, originator

if TYPE_CHECKING:
    from ..originate import Generation


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
    generation = trio.run(_generate, config, prompt, params)
    if not generation.text.endswith("\n"):
        sys.stdout.write("\n")
    if json_result:
        sys.stdout.write(json.dumps(originator.result_record(generation)) + "\n")
    sys.stdout.flush()
    sys.stderr.write(originator.figures(generation) + "\n")
    return failures.OK


async def _generate(config: NodeConfig, prompt: str, params: SamplingParams) -> "Generation":
    from ..node import Node

    shown = False
    async with Node(config) as node:
        handle = await node.submit(prompt, params)
        try:
            async for piece in handle:
                sys.stdout.write(piece)
                sys.stdout.flush()
                shown = True
            return await handle.result()
        except PetalsError as error:
            if not shown:
                raise
            sys.stdout.write("\n")
            raise failures.CommandFailed(f"the text broke off: {error}") from error
