"""A conversation whose answer breaks off: a person may try again, a pipe is told that it failed."""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from petals.inference.sampling_params import SamplerState, SamplingParams
from petals.node.cli import chat, failures
from petals.node.saved_session import SavedSession, Writing
from petals.protocol.errors import NoRoute
from petals.protocol.tensor import DType
from support.tiny_tokenizer import tiny_tokenizer

OnTokens = Callable[[list[int]], Sequence[bool]]
PARAMS = SamplingParams(max_new_tokens=4)


def ids_of(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer()(text)["input_ids"]
    return ids


@dataclass
class EchoSession:
    """Answers with what was said last; breaks off behind the first token as often as it is told."""

    failures: int = 0
    tokens: list[int] = field(default_factory=list)
    begin: int = 0
    left: list[int] = field(default_factory=list)
    max_tokens: int = 100
    ring: None = None

    @property
    def originator(self) -> Any:
        checkpoint = SimpleNamespace(eos_token_ids=())
        return SimpleNamespace(tokenizer=tiny_tokenizer(), checkpoint=checkpoint)

    @property
    def token_ids(self) -> list[list[int]]:
        return [self.tokens]

    @property
    def unfinished(self) -> bool:
        return bool(self.left)

    def saved(self) -> SavedSession:
        writing = None
        if self.left:
            params = SamplingParams(max_new_tokens=len(self.tokens) - self.begin + len(self.left))
            writing = Writing(self.begin, params, SamplerState((False,)))
        tokens = (tuple(self.tokens),)
        return SavedSession("echo", "", DType.FLOAT32, 100, (0,), tokens, writing)

    async def write(
        self, token_ids: list[list[int]], params: SamplingParams, on_tokens: OnTokens
    ) -> None:
        assert params == PARAMS
        self.tokens += token_ids[0]
        self.begin, self.left = len(self.tokens), token_ids[0]
        await self.go_on(on_tokens)

    async def go_on(self, on_tokens: OnTokens) -> None:
        while self.left:
            token, *self.left = self.left
            self.tokens.append(token)
            on_tokens([token])
            if self.failures:
                self.failures -= 1
                raise NoRoute("nobody serves 3:5")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def talk(
    session: EchoSession, keyboard: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", keyboard)
    await chat._Conversation(cast("Any", session), PARAMS, 120.0).run()


async def test_an_answer_that_broke_off_is_finished_before_anything_else_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = EchoSession(failures=2)
    await talk(session, Terminal("hello world\n\nand now\n"), monkeypatch)
    shown = capsys.readouterr()
    assert shown.out.replace("> ", "") == "hello world\nand now\n"
    assert shown.err.count("The answer broke off: nobody serves 3:5.") == 2
    assert session.tokens == 2 * ids_of("hello world\n") + 2 * ids_of("and now\n")


async def test_a_conversation_that_ends_with_half_an_answer_has_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(failures.CommandFailed, match="the last answer broke off"):
        await talk(EchoSession(failures=1), Terminal("hello world\n"), monkeypatch)


async def test_nobody_is_at_a_pipe_to_try_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(failures.CommandFailed, match="the answer broke off: nobody serves 3:5"):
        await talk(EchoSession(failures=1), io.StringIO("hello world\nand now\n"), monkeypatch)


async def test_a_conversation_goes_on_in_the_middle_of_an_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said, answer = ids_of("hello world\n"), ids_of("in the beginning")
    session = EchoSession(tokens=[*said, *answer[:2]], begin=len(said), left=answer[2:])
    await talk(session, io.StringIO("and now\n"), monkeypatch)
    shown = capsys.readouterr()
    assert shown.out == "in the beginning\nand now\n"
    assert shown.err == "hello world\n"


async def test_of_a_long_conversation_the_end_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = ids_of("hello world\n" * 100)
    session = EchoSession(tokens=tokens, begin=len(tokens))
    await talk(session, io.StringIO(""), monkeypatch)
    shown = capsys.readouterr()
    assert shown.err == "… " + "hello world\n" * 50
    assert not shown.out
