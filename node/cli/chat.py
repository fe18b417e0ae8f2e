"""``petals-node chat``: turns on one session, whose KV cache the swarm keeps between them.

What is typed goes to the model in its chat template (``inference/chat_template.py``). Without one,
it goes as it is, with a line break behind it, and the model goes on with the text.

An answer that breaks off because nobody serves some blocks is not lost: a person may try again, and
before anything else is said it is gone on with. With ``--resume FILE`` the whole conversation is kept in the file, and goes on from
there if the file is there already.
"""

import contextlib
import dataclasses
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ...inference.progress import Step
from ...inference.sampling_params import SamplingParams
from ...protocol.errors import NoRoute
from ..config import NodeConfig
from ..saved_session import SavedSession
from . import failures, originator, progress
from .originator import note

if TYPE_CHECKING:
    from ..node import Node
    from ..originate import Session

QUIT = "/quit"
SHOWN_CHARACTERS = 600
"""Of a conversation that is gone on with: enough to see where one was."""


def chat(
    config: NodeConfig,
    params: SamplingParams,
    *,
    max_tokens: int | None,
    file: Path | None,
    saved: SavedSession | None,
) -> int:
    """Read a line, write the model's text, and so on, until /quit or the end of the input."""
    trio.run(partial(_chat, config, params, max_tokens=max_tokens, file=file, saved=saved))
    return failures.OK


async def _chat(
    config: NodeConfig,
    params: SamplingParams,
    *,
    max_tokens: int | None,
    file: Path | None,
    saved: SavedSession | None,
) -> None:
    from ..autosave import keep_saved

    async with (
        originator.joined(config) as (node, end_of_bars),
        _open_session(node, max_tokens, saved) as session,
    ):
        end_of_bars()
        if file is not None:
            await session.save(file)  # where it cannot be written, that is told now
        async with keep_saved(session, file):
            note(f"Talking to {node.model_name}; {QUIT} or Ctrl-D ends the conversation.")
            if saved is not None:
                note(f"Going on from {file}, with {saved.length} tokens.")
            try:
                await _Conversation(session, params, config.patience).run()
            except (failures.CommandFailed, KeyboardInterrupt):
                if file is not None:
                    note(f"The conversation is in {file}: --resume {file} goes on.")
                raise


@contextlib.asynccontextmanager
async def _open_session(
    node: "Node", max_tokens: int | None, saved: SavedSession | None
) -> AsyncIterator["Session"]:
    if saved is None:
        async with node.open_session(max_tokens) as session:
            yield session
        return
    room = saved.max_tokens if max_tokens is None else max_tokens
    async with node.reopen_session(dataclasses.replace(saved, max_tokens=room)) as session:
        yield session


class _Conversation:
    """Takes turns until the input ends."""

    def __init__(self, session: "Session", params: SamplingParams, patience: float) -> None:
        from ...inference.chat_template import ChatTemplate

        self._session = session
        self._params = params
        self._patience = patience
        own = session.originator
        self._template = ChatTemplate(own.tokenizer, own.checkpoint.eos_token_ids)
        self._answer: _Answer | None = None
        """An answer that broke off."""

    async def run(self) -> None:
        await self._catch_up()
        while (line := await _read_line()) is not None:
            await self._go_on()
            if self._answer is not None or not line.strip():
                continue
            if not await self._take_turn(line):
                note("The conversation has no room left; start another, or one with --max-tokens.")
                break
        if self._answer is not None:
            raise failures.CommandFailed("the last answer broke off")

    async def _catch_up(self) -> None:
        """Show where a conversation from a file is, and finish the answer that it is in."""
        saved = self._session.saved()
        [tokens], writing = saved.token_ids, saved.writing
        answer_at = writing.begin if writing is not None and saved.unfinished else len(tokens)
        decode = self._session.originator.tokenizer.decode
        said = decode(tokens[saved.padding[0] : answer_at], skip_special_tokens=True)
        if said:
            note(
                ("… " if len(said) > SHOWN_CHARACTERS else "")
                + said[-SHOWN_CHARACTERS:].rstrip("\n")
            )
        if writing is not None and saved.unfinished:
            self._answer = _Answer(self._session, writing.params)
            for token in tokens[answer_at:]:
                self._answer.show([token])
            await self._go_on()

    async def _go_on(self) -> None:
        if self._answer is not None:
            await self._write(self._answer, self._session.go_on)

    async def _take_turn(self, text: str) -> bool:
        """Let the model answer ``text``; False if the session has no room for that."""
        session = self._session
        token_ids = self._template.turn(text, session.token_ids[0])
        room = session.max_tokens - len(session.token_ids[0]) - len(token_ids)
        if room < 1:
            return False
        bounded = dataclasses.replace(
            self._params, max_new_tokens=min(self._params.max_new_tokens, room)
        )
        await self._write(_Answer(session, bounded), partial(session.write, [token_ids], bounded))
        return True

    async def _write(
        self,
        answer: "_Answer",
        write: Callable[[Callable[[list[int]], list[bool]]], Awaitable[None]],
    ) -> None:
        def waiting_for() -> str | None:
            ring = self._session.ring
            return None if ring is None else ring.waiting_for

        def reading() -> Step:
            ring, tokens = self._session.ring, self._session.token_ids[0]
            return Step("reading", 0 if ring is None else ring.sent, len(tokens), "tokens")

        try:
            async with (
                originator.telling_waits(waiting_for, self._patience),
                progress.watching(reading) as end_of_bar,
            ):

                def show(tokens: list[int]) -> list[bool]:
                    end_of_bar()
                    return answer.show(tokens)

                await write(show)
        except NoRoute as error:
            if not sys.stdin.isatty():
                raise failures.CommandFailed(f"the answer broke off: {error}") from error
            self._answer = answer
            note(f"\nThe answer broke off: {error}. An empty line tries again; {QUIT} ends.")
        else:
            self._answer = None
            answer.end()


class _Answer:
    """What the model says in one turn, written as it comes."""

    def __init__(self, session: "Session", params: SamplingParams) -> None:
        from ...inference.detokenizer import Detokenizer

        self._text = Detokenizer(session.originator.tokenizer, stop=params.stop)
        self._eos = session.originator.checkpoint.eos_token_ids

    def show(self, tokens: list[int]) -> list[bool]:
        """Write what has become certain; says whether the answer ends there."""
        _write(self._text.add(tokens[0]))
        return [self._text.stopped or tokens[0] in self._eos]

    def end(self) -> None:
        """Write the rest, and end the line."""
        rest = self._text.finish()
        _write(rest if self._text.text.endswith("\n") else rest + "\n")


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


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
