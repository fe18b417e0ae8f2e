"""``petals-node generate``: text to standard output as it comes, everything else to stderr.

With ``--resume FILE`` the text is kept in the file while it comes. If the file is there already, its text
is written first, and goes on as it would have without whatever broke it off.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ...inference.progress import Step
from ...inference.sampling_params import SamplingParams
from ...protocol.errors import ConfigError, PetalsError
from ..config import NodeConfig
from ..saved_session import SavedSession
from . import failures, leaving, originator, progress

if TYPE_CHECKING:
    from ..generation import GenerationStatus


def generate(
    config: NodeConfig,
    prompt: str | None,
    params: SamplingParams,
    *,
    file: Path | None,
    saved: SavedSession | None,
    json_result: bool,
    exit_with_stdin: bool,
) -> int:
    """Generate from one prompt, or go on with ``saved``; ``-`` is the prompt on standard input."""
    if exit_with_stdin:
        leaving.leave_when_stdin_ends()
    elif prompt == "-":
        prompt = sys.stdin.read()
    check_prompt(prompt, file, saved)
    trio.run(
        partial(_generate, config, prompt, params, file=file, saved=saved, json_result=json_result)
    )
    return failures.OK


def check_prompt(prompt: str | None, file: Path | None, saved: SavedSession | None) -> None:
    """Raise ConfigError if there is nothing to go on from."""
    if prompt is None and saved is None and file is not None:
        raise ConfigError(
            f"PROMPT: there is no file {file} to go on from; write what to begin with"
        )
    if not prompt and (prompt is not None or saved is None):
        raise ConfigError("PROMPT: there is no text to go on from; write at least one character")


async def _generate(
    config: NodeConfig,
    prompt: str | None,
    params: SamplingParams,
    *,
    file: Path | None,
    saved: SavedSession | None,
    json_result: bool,
) -> None:
    async with originator.joined(config) as (node, end_of_bars):
        if file is not None and saved is not None:
            handle = await node.resume(file, prompt=prompt, save_to=file)
            end_of_bars()
            originator.note(f"Going on from {file}, with {handle.status().tokens} tokens.")
        else:
            assert prompt is not None
            handle = await node.submit(prompt, params, save_to=file)
            end_of_bars()
        shown = False
        try:
            async with (
                originator.telling_waits(lambda: handle.status().waiting_for, config.patience),
                progress.watching(lambda: _reading(handle.status())) as end_of_bar,
            ):
                async for piece in handle:
                    end_of_bar()
                    _write(piece)
                    shown = True
                generation = await handle.result()
        except (PetalsError, KeyboardInterrupt) as error:
            if shown:
                _write("\n")
            if file is not None:
                originator.note(f"What there is so far is in {file}: --resume {file} goes on.")
            if not shown or not isinstance(error, PetalsError):
                raise
            advice = "" if file is not None else " (with --resume FILE one can go on from there)"
            raise failures.CommandFailed(f"the text broke off: {error}{advice}") from error
        # Before leaving the swarm, which takes a moment: nobody has to wait for that.
        if not generation.text.endswith("\n"):
            _write("\n")
        if json_result:
            _write(json.dumps(originator.result_record(generation)) + "\n")
        sys.stderr.write(originator.figures(generation) + "\n")


def _reading(status: "GenerationStatus") -> Step:
    return Step("reading the prompt", status.prompt_sent, status.prompt_tokens, "tokens")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
