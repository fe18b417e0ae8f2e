"""A text that is being generated on its own, while others look at it, wait for it, or end it.

What runs is a ``Session`` (``originate.py``); here is how far it is, and what came out.
"""

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ..inference.detokenizer import Detokenizer
from ..inference.sampling import TokenLogprobs
from ..protocol.chain import ChainState
from ..protocol.errors import PetalsError
from ..protocol.routing import RouteHop
from . import saved_session
from .autosave import keep_saved
from .mending import Recovery
from .saved_session import SavedSession, Writing
from .wakeup import Signal

if TYPE_CHECKING:
    from .originate import Originator, Session


class GenerationState(StrEnum):
    """Where a generation is."""

    QUEUED = "queued"
    ROUTING = "routing"
    PREFILL = "prefill"
    GENERATING = "generating"
    RECOVERING = "recovering"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing will happen any more."""
        return self in (self.DONE, self.FAILED, self.CANCELLED)


@dataclass(frozen=True, slots=True)
class GenerationStatus:
    """A look at a running generation."""

    state: GenerationState
    tokens: int
    """New tokens so far, per sequence."""
    tokens_per_second: float
    route: tuple[RouteHop, ...]
    recoveries: int
    waiting_for: str | None = None
    """Why nothing goes on at the moment, such as blocks that nobody serves; None when it does."""
    error: str | None = None
    prompt_tokens: int = 0
    """Tokens that stand before the first new one, per sequence; also those of a resumed text."""
    prompt_sent: int = 0
    """How many of them have gone into the ring."""
    mended: tuple[Recovery, ...] = ()
    """Which hops were lost meanwhile, and what was done about it; of very many the last ones."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What came out: of one prompt. Only what is new, not the prompt."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    """Of ``token_ids``, if the params asked for them; of a resumed text only those behind the
    restored ones."""
    finish_reason: str
    """``length`` (max_new_tokens), ``eos`` (the model ended the text) or ``stop``."""
    tokens_per_second: float
    """Of decoding: tokens behind the first one over the time they took, restored ones apart."""
    time_to_first_token: float
    """Seconds from the call to the first token, routing and prefill included."""
    route: tuple[RouteHop, ...]
    recoveries: int


class GenerationHandle:
    """A generation that runs on its own. Made by ``submit`` and ``resume``."""

    def __init__(
        self,
        originator: "Originator",
        saved: SavedSession,
        writing: Writing,
        save_to: Path | None,
    ) -> None:
        self.id = secrets.token_hex(12)
        """Names it among others; says nothing about it."""
        self._originator = originator
        self._begun = saved
        self._save_to = save_to
        stop = writing.params.stop
        self._texts = [Detokenizer(originator.tokenizer, stop=stop) for _ in saved.token_ids]
        self._new: list[list[int]] = [[] for _ in saved.token_ids]
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in saved.token_ids]
        self._reasons: list[str | None] = [None for _ in saved.token_ids]
        self._pieces: list[str] = []
        for position in range(writing.begin, saved.length):
            self._add([tokens[position] for tokens in saved.token_ids], ())
        self._restored = saved.length - writing.begin
        self._state = GenerationState.QUEUED
        self._error: Exception | None = None
        self._changed = Signal()
        self._scope = trio.CancelScope()
        self._session: Session | None = None
        """Set once it was opened; when it is closed, its tokens are still there."""
        self._route: tuple[RouteHop, ...] = ()
        self._recoveries = 0
        self._mended: tuple[Recovery, ...] = ()
        self._created = trio.current_time()
        self._first: float | None = None
        """When the first token came that was not restored."""
        self._latest = self._created

    def status(self) -> GenerationStatus:
        """How far it is."""
        self._look_at_ring()
        ring = None if self._session is None else self._session.ring
        return GenerationStatus(
            state=self._state,
            tokens=max(map(len, self._new)),
            tokens_per_second=self._speed(),
            route=self._route,
            recoveries=self._recoveries,
            waiting_for=None if ring is None else ring.waiting_for,
            error=None if self._error is None else str(self._error),
            prompt_tokens=self._begun.length,
            prompt_sent=0 if ring is None else min(ring.sent, self._begun.length),
            mended=self._mended,
        )

    def cancel(self) -> None:
        """Stop; what was generated so far stays in ``partial``."""
        self._scope.cancel()

    async def wait(self) -> None:
        """Return when it has ended, one way or another."""
        while not self._state.final:
            await self._changed.wait()

    async def more(self, than: int) -> None:
        """Return when there are more new tokens per sequence ``than`` so many, or it has ended."""
        while max(map(len, self._new)) <= than and not self._state.final:
            await self._changed.wait()

    async def save(self, path: Path | str) -> None:
        """Put what there is so far into a file that ``resume`` goes on from. Raises ConfigError.

        What is there is replaced. It may be running, or have ended in whatever way.
        """
        saved = self._begun if self._session is None else self._session.saved()
        await trio.to_thread.run_sync(saved_session.save, Path(path), saved)

    async def result(self) -> Generation:
        """What came out of the (first) prompt, when it has ended.

        Raises what made it fail, or PetalsError if it was cancelled; ``partial`` has what was
        generated until then.
        """
        return (await self.results())[0]

    async def results(self) -> list[Generation]:
        """What came out of every prompt, when all have ended. Raises as ``result`` does."""
        await self.wait()
        if self._error is not None:
            raise self._error
        if self._state is GenerationState.CANCELLED:
            raise PetalsError("the generation was cancelled")
        return self.partial()

    def partial(self) -> list[Generation]:
        """What there is so far, of every prompt."""
        return [
            Generation(
                text=text.text,
                token_ids=tuple(tokens),
                logprobs=tuple(logprobs),
                finish_reason=reason or "length",
                tokens_per_second=self._speed(),
                time_to_first_token=(self._first or self._latest) - self._created,
                route=self._route,
                recoveries=self._recoveries,
            )
            for text, tokens, logprobs, reason in zip(
                self._texts, self._new, self._logprobs, self._reasons, strict=True
            )
        ]

    def __aiter__(self) -> AsyncIterator[str]:
        """The text of the (first) prompt as it comes. Raises what made it fail."""
        return _Pieces(self)

    async def piece(self, number: int) -> str | None:
        """A piece of that text, once it is there; None when it has ended before."""
        while number >= len(self._pieces):
            if self._error is not None and self._state.final:
                raise self._error
            if self._state.final:
                return None
            await self._changed.wait()
        return self._pieces[number]

    async def run(self) -> None:
        """Do it; a task of whoever submitted it. Never raises but for being cancelled."""
        try:
            await self._run()
        except PetalsError as error:
            self._error = error
        self._look_at_ring()
        if self._error is not None:
            self._end(GenerationState.FAILED)
        elif self._scope.cancelled_caught:
            self._end(GenerationState.CANCELLED)
        else:
            self._end(GenerationState.DONE)

    async def _run(self) -> None:
        if not self._begun.unfinished:
            return
        async with self._originator.reopen_session(self._begun) as session:
            self._session = session
            try:
                self._state = GenerationState.ROUTING
                # Only the text is cancelled: the ring's own tasks tell its hops that it is over.
                with self._scope:
                    async with keep_saved(session, self._save_to):
                        await session.go_on(self._take)
            finally:
                self._look_at_ring()

    def _take(self, tokens: list[int]) -> list[bool]:
        """Take a step's tokens in; says which sequences have reached an end."""
        self._latest = trio.current_time()
        if self._first is None:
            self._first = self._latest
        self._add(tokens, () if self._session is None else self._session.logprobs)
        self._changed.notify()
        return [reason is not None for reason in self._reasons]

    def _add(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        eos = self._originator.checkpoint.eos_token_ids
        for row, token in enumerate(tokens):
            if self._reasons[row] is not None:
                continue
            self._new[row].append(token)
            self._logprobs[row].extend(logprobs[row : row + 1])
            piece = self._texts[row].add(token)
            if token in eos:
                self._reasons[row] = "eos"
            elif self._texts[row].stopped:
                self._reasons[row] = "stop"
            if row == 0 and piece:
                self._pieces.append(piece)

    def _end(self, state: GenerationState) -> None:
        for row, text in enumerate(self._texts):
            rest = text.finish()
            if row == 0 and rest:
                self._pieces.append(rest)
        self._state = state
        self._changed.notify()

    def _look_at_ring(self) -> None:
        if self._session is None or self._session.ring is None:
            return
        ring = self._session.ring
        self._recoveries, self._mended = ring.recoveries, ring.mended
        if ring.state is ChainState.RUNNING:
            self._route = ring.route
            generating = self._first is not None
            self._state = GenerationState.GENERATING if generating else GenerationState.PREFILL
        elif self._route:
            self._state = GenerationState.RECOVERING

    def _speed(self) -> float:
        tokens = max(map(len, self._new)) - self._restored
        if self._first is None or tokens <= 0:
            return 0.0
        if tokens == 1:
            return 1 / max(self._first - self._created, 1e-9)
        return (tokens - 1) / max(self._latest - self._first, 1e-9)


class _Pieces:
    """An iteration over a handle's text. No generator, so that it can be left at any time."""

    def __init__(self, handle: GenerationHandle) -> None:
        self._handle = handle
        self._next = 0

    def __aiter__(self) -> "_Pieces":
        return self

    async def __anext__(self) -> str:
        piece = await self._handle.piece(self._next)
        if piece is None:
            raise StopAsyncIteration
        self._next += 1
        return piece
