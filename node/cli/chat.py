"""``petals-node chat``: turns on one session, whose KV cache the swarm keeps between them.

What is typed goes to the model as it is, with a line break behind it: a model without training for
conversations goes on with the text, one with it may be given its own marks by the user.
"""

import dataclasses
import sys
from typing import TYPE_CHECKING

import trio

from ...inference.sampling_params import SamplingParams
from ..config import NodeConfig
from . import failures

if TYPE_CHECKING:
    from ..originate import Session

QUIT = "/quit"


def chat(config: NodeConfig, params: SamplingParams, *, max_tokens: int | None) -> int:
    """Read a line, write the model's text, and so on, until /quit or the end of the input."""
    trio.run(_chat, config, params, max_tokens)
    return failures.OK


async def _chat(config: NodeConfig, params: SamplingParams, max_tokens: int | None) -> None:
    from ..node import Node

    async with Node(config) as node, node.open_session(max_tokens) as session:
        _note(f"Talking to {node.model_name}; {QUIT} or Ctrl-D ends the conversation.")
        while (line := await _read_line()) is not None:
            if not line.strip():
                continue
            if not await _take_turn(session, line + "\n", params):
                _note("The conversation has no room left; start another, or one with --max-tokens.")
                break


async def _read_line() -> str | None:
    """The next line of the input; None at its end or when the user quits."""
    prompt = "> " if sys.stdin.isatty() else ""

    def ask() -> str | None:
        try:
            return input(prompt)
        except EOFError:
            return None

    # Waiting in a thread keeps the connections alive; Ctrl-C leaves the thread behind.
    line = await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
    return None if line is None or line.strip() == QUIT else line


async def _take_turn(session: "Session", text: str, params: SamplingParams) -> bool:
    """Let the model answer ``text``; False if the session has no room for that."""
    from ...inference.detokenizer import Detokenizer

    originator = session.originator
    token_ids = originator.tokenizer(text)["input_ids"]
    room = session.max_tokens - len(session.token_ids[0]) - len(token_ids)
    if room < 1:
        return False
    answer = Detokenizer(originator.tokenizer, stop=params.stop)
    eos = originator.checkpoint.eos_token_ids

    def show(tokens: list[int]) -> list[bool]:
        _write(answer.add(tokens[0]))
        return [answer.stopped or tokens[0] in eos]

    bounded = dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, room))
    await session.write([token_ids], bounded, show)
    rest = answer.finish()
    _write(rest if answer.text.endswith("\n") else rest + "\n")
    return True


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")
