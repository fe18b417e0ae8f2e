"""Turn prompts into text: the one implementation below the command line, Python and every face.

A ``Session`` is a ring with tokens: what has gone around, and the token sampled last, which goes
around with the next step. ``write`` extends it by a prompt and samples until an end; if it is broken
off (nobody serves some blocks, it is cancelled, the process dies), ``go_on`` is the rest of it. A
``GenerationHandle`` is a ``write`` that runs on its own while others look at it.

At any time between two tokens a session can be saved (``saved_session.py``): with its last token a
``Session`` keeps the sampler's state behind that token, whatever the sampler is doing meanwhile. So
there is one way to go on, from tokens and a state, and a new session is one without tokens.
"""

import contextlib
import dataclasses
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import trio

from ..inference.checkpoint import Checkpoint
from ..inference.detokenizer import Detokenizer
from ..inference.head import Head, HeadRows
from ..inference.model import Ends
from ..inference.sampling import Sampler, SamplerState, SamplingParams, TokenLogprobs
from ..inference.tensors import to_torch, to_wire
from ..protocol.chain import ChainState, SessionTerms
from ..protocol.errors import ConfigError, LocalProtocolError, PetalsError
from ..protocol.frames import Hello
from ..protocol.routing import RouteHop
from ..protocol.span import Span
from ..protocol.swarm import Swarm
from ..protocol.tensor import DType, WireTensor
from . import saved_session
from .autosave import keep_saved
from .gaps import Router
from .hidden_session import HiddenSession
from .mending import Recovery
from .network import Network
from .ring import EmbedRows, Ring, new_session_id, open_ring
from .saved_session import SavedSession, Writing
from .wakeup import Signal

T = TypeVar("T")

Prompt = str | Sequence[int]
"""A text, or the token ids of one."""


class Compute(Protocol):
    """Runs a function on the thread that torch has in this process."""

    async def __call__(self, function: Callable[[], T]) -> T:
        """What ``function`` returns or raises."""
        ...


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


class Session:
    """A ring and the tokens that it holds; keeps its KV cache over several calls of ``write``.

    Made by ``Originator.open_session``, or from a saved one by ``reopen_session``. One caller at a
    time. After a NoRoute it can be used as before: what was sampled is kept, and the next call looks
    for a route again.
    """

    def __init__(self, originator: "Originator", terms: SessionTerms, saved: SavedSession) -> None:
        self.originator = originator
        """Its model, tokenizer and ends."""
        self._terms = terms
        self._begun = saved
        self._tokens = [list(tokens) for tokens in saved.token_ids]
        """Per sequence, what has gone around, and behind it what goes next."""
        self._writing = saved.writing
        """How to go on behind the last token; it changes in the same breath as that."""
        self._embedded: tuple[tuple[list[int], ...], WireTensor] | None = None
        """The tokens sampled last, one a sequence, and their embeddings."""
        self.changed = Signal()
        """There are more tokens, or fewer."""
        self.logprobs: tuple[TokenLogprobs, ...] = ()
        """Per sequence, of the token sampled last, if the params ask for them."""
        self.ring: Ring | None = None
        """Set while the session is open."""

    @property
    def max_tokens(self) -> int:
        """Positions that the session may grow to."""
        return self._terms.max_tokens

    @property
    def token_ids(self) -> list[list[int]]:
        """Per sequence, everything so far: left padding, prompts and what was generated."""
        return [list(tokens) for tokens in self._tokens]

    @property
    def unfinished(self) -> bool:
        """Whether the last ``write`` was broken off, so that there is something to go on with."""
        return self._writing is not None and self._writing.left(len(self._tokens[0])) > 0

    def saved(self) -> SavedSession:
        """The session as it is behind its last token."""
        return dataclasses.replace(
            self._begun,
            token_ids=tuple(tuple(tokens) for tokens in self._tokens),
            writing=self._writing,
        )

    async def save(self, path: Path | str) -> None:
        """Put the session into a file, in place of what is there. Raises ConfigError."""
        await trio.to_thread.run_sync(saved_session.save, Path(path), self.saved())

    def rewind(self, position: int) -> None:
        """Forget the tokens from ``position`` on, so that the text goes on differently there."""
        ring = self._running()
        if not 0 <= position < len(self._tokens[0]):
            raise ConfigError(
                f"position: {position} is not among the session's {len(self._tokens[0])} tokens"
            )
        for tokens in self._tokens:
            del tokens[position:]
        self._now_writing(None)
        if position < ring.length:
            ring.rewind(position)

    async def forward(self, token_ids: Sequence[Sequence[int]], *, want: int = 1) -> torch.Tensor:
        """Send tokens [batch, rows] around behind those before.

        Returns the hidden states of the last ``want`` positions, [batch, want, hidden_size] in the
        wire dtype. Raises ConfigError when they do not fit the session, NoRoute when nobody serves
        some blocks: then the tokens are the session's already, and a call with no rows tries again.
        """
        self._extend(token_ids)
        self._now_writing(None)
        return await self._step(want)

    async def write(
        self,
        token_ids: Sequence[Sequence[int]],
        params: SamplingParams,
        on_tokens: Callable[[list[int]], Sequence[bool]],
    ) -> None:
        """Extend the session by a prompt [batch, rows] and then by sampled tokens.

        ``on_tokens`` gets every step's tokens, one per sequence, and says which sequences are to
        end there. Returns when all have ended or after ``max_new_tokens``. Raises as ``forward``.
        """
        self._extend(token_ids)
        state = SamplerState((False,) * self._terms.batch)
        self._now_writing(Writing(len(self._tokens[0]), params, state))
        await self.go_on(on_tokens)

    async def go_on(self, on_tokens: Callable[[list[int]], Sequence[bool]]) -> None:
        """The rest of a ``write`` that was broken off, here or in the process that saved it."""
        writing = self._writing
        if writing is None:
            raise LocalProtocolError("go_on: no write was broken off in this session")
        compute, head = self.originator.compute, self.originator.head
        checkpoint = self.originator.checkpoint
        sampler = Sampler(
            writing.params,
            self._tokens,
            padding=self._terms.padding,
            eos_token_ids=checkpoint.eos_token_ids,
            pad_token_id=checkpoint.pad_token_id,
            begin=writing.begin,
            state=writing.sampler,
        )
        for _ in range(writing.left(len(self._tokens[0]))):
            rows = head.add(await self._step(want=1))

            # One crossing to torch's thread a token: what is sampled now goes around next.
            def sample(rows: HeadRows = rows) -> tuple[list[int], SamplerState, WireTensor]:
                tokens = sampler.sample(rows.logits()[:, -1])
                return tokens, sampler.state(), self._embed_now([[token] for token in tokens])

            tokens, state, embeddings = await compute(sample)
            self._embedded = tuple([token] for token in tokens), embeddings
            for sequence, token in zip(self._tokens, tokens, strict=True):
                sequence.append(token)
            self._now_writing(dataclasses.replace(writing, sampler=state))
            self.logprobs = sampler.logprobs
            ended = [row for row, end in enumerate(on_tokens(tokens)) if end]
            for row in ended:
                sampler.finish(row)
            if ended:
                self._now_writing(dataclasses.replace(writing, sampler=sampler.state()))
            if all(sampler.finished):
                return

    def _now_writing(self, writing: Writing | None) -> None:
        self._writing = writing
        self.changed.notify()

    def _extend(self, token_ids: Sequence[Sequence[int]]) -> None:
        self._running()
        self._check_room(len(self._tokens[0]) + len(token_ids[0]))
        for tokens, more in zip(self._tokens, token_ids, strict=True):
            tokens.extend(more)

    def _check_room(self, length: int) -> None:
        if length > self._terms.max_tokens:
            raise ConfigError(
                f"{length} tokens do not fit this session of {self._terms.max_tokens}; start a new "
                "one with more room"
            )

    async def _step(self, want: int) -> torch.Tensor:
        """Send around what has not gone around; the last ``want`` rows of what comes back.

        Rows that have gone around in a step that was broken off are lost, or under way to nobody.
        They go around again.
        """
        ring, length = self._running(), len(self._tokens[0])
        self._check_room(length)
        if length - want < ring.length:
            ring.rewind(length - want)
        outputs = await ring.step(length - ring.length, want=want)
        tensors = [to_torch(output) for output in outputs]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)

    async def embed(self, start: int, stop: int) -> WireTensor:
        """The embeddings [batch, stop - start, hidden_size] of positions of this session."""
        token_ids = tuple(tokens[start:stop] for tokens in self._tokens)
        if self._embedded is not None and self._embedded[0] == token_ids:
            return self._embedded[1]
        return await self.originator.compute(lambda: self._embed_now(token_ids))

    def _embed_now(self, token_ids: Sequence[Sequence[int]]) -> WireTensor:
        """On torch's thread: the embeddings of token ids [batch, rows], wherever they stand."""
        embeddings = self.originator.ends.embed(torch.tensor(token_ids))
        return to_wire(embeddings, self._terms.wire_dtype)

    def _running(self) -> Ring:
        if self.ring is None:
            raise PetalsError("the session is closed; open a new one")
        return self.ring


class Originator:
    """Everything that sessions of one model need at their originator."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ends: Ends,
        tokenizer: Any,
        *,
        wire_dtype: DType,
        compute: Compute,
        network: Network,
        router: Router,
        swarm: Swarm,
        hello: Hello,
        clock: Callable[[], float],
        patience: float,
    ) -> None:
        self.checkpoint = checkpoint
        self.ends = ends
        self.head = Head(ends)
        self.tokenizer = tokenizer
        self.compute = compute
        self._wire_dtype = wire_dtype
        self._network = network
        self._router = router
        self._swarm = swarm
        self._hello = hello
        self._clock = clock
        self._patience = patience

    @contextlib.asynccontextmanager
    async def open_session(
        self, max_tokens: int, *, batch: int = 1, padding: Sequence[int] = ()
    ) -> AsyncIterator[Session]:
        """A session of ``batch`` sequences with room for ``max_tokens`` positions each.

        Sequence b's first ``padding[b]`` positions are left padding. Routes are planned at once.
        """
        new = self._new_session(max_tokens, ((),) * batch, tuple(padding) or (0,) * batch)
        async with self.reopen_session(new) as session:
            yield session

    @contextlib.asynccontextmanager
    async def reopen_session(self, saved: SavedSession) -> AsyncIterator[Session]:
        """A session that goes on behind the tokens of a saved one. Raises ConfigError.

        What the old one's hops held is computed again, from the tokens, with the first step.
        """
        self._check(saved)
        terms = self._terms(
            Span(0, self.checkpoint.num_blocks), saved.max_tokens, saved.padding, saved.wire_dtype
        )
        session = Session(self, terms, saved)
        async with self._open_ring(terms, session.embed) as ring:
            session.ring = ring
            try:
                yield session
            finally:
                session.ring = None

    @contextlib.asynccontextmanager
    async def open_hidden_session(
        self,
        max_tokens: int,
        *,
        span: Span | None = None,
        batch: int = 1,
        padding: Sequence[int] = (),
    ) -> AsyncIterator[HiddenSession]:
        """A session whose rows are hidden states, through the blocks of ``span`` (None: all of them).

        Raises ConfigError for what the model does not have.
        """
        everything = Span(0, self.checkpoint.num_blocks)
        span = span or everything
        if not everything.covers(span):
            raise ConfigError(
                f"blocks: {span} are not among the blocks {everything} of {self.checkpoint.name}"
            )
        self._check_length(max_tokens)
        terms = self._terms(span, max_tokens, tuple(padding) or (0,) * batch, self._wire_dtype)
        session = HiddenSession(terms)
        async with self._open_ring(terms, session.read) as ring:
            session.ring = ring
            try:
                yield session
            finally:
                session.ring = None

    def _terms(
        self, span: Span, max_tokens: int, padding: tuple[int, ...], wire_dtype: DType
    ) -> SessionTerms:
        return SessionTerms(
            session=new_session_id(),
            model=self.checkpoint.fingerprint,
            span=span,
            hidden_size=self.checkpoint.hidden_size,
            batch=len(padding),
            padding=padding,
            max_tokens=max_tokens,
            wire_dtype=wire_dtype,
        )

    def _open_ring(
        self, terms: SessionTerms, embed: EmbedRows
    ) -> contextlib.AbstractAsyncContextManager[Ring]:
        return open_ring(
            terms,
            network=self._network,
            router=self._router,
            swarm=self._swarm,
            hello=self._hello,
            embed=embed,
            clock=self._clock,
            patience=self._patience,
        )

    def _new_session(
        self,
        max_tokens: int,
        token_ids: Sequence[Sequence[int]],
        padding: tuple[int, ...],
        writing: Writing | None = None,
    ) -> SavedSession:
        return SavedSession(
            model=self.checkpoint.name,
            fingerprint=self.checkpoint.fingerprint,
            wire_dtype=self._wire_dtype,
            max_tokens=max_tokens,
            padding=padding,
            token_ids=tuple(tuple(tokens) for tokens in token_ids),
            writing=writing,
        )

    def _check(self, saved: SavedSession) -> None:
        """Raise ConfigError if the session cannot be one of this model."""
        checkpoint = self.checkpoint
        if saved.fingerprint != checkpoint.fingerprint:
            raise ConfigError(
                f"the session was saved with the model {saved.model} (fingerprint "
                f"{saved.fingerprint[:16]}), and {checkpoint.name} is another (fingerprint "
                f"{checkpoint.fingerprint[:16]}); go on with the first, or begin anew"
            )
        self._check_length(saved.max_tokens)
        if any(max(tokens, default=0) >= checkpoint.vocab_size for tokens in saved.token_ids):
            raise ConfigError(
                f"the session has tokens that are not among the {checkpoint.vocab_size} of "
                f"{checkpoint.name}; it is damaged, or of another model"
            )

    def _check_length(self, max_tokens: int) -> None:
        checkpoint = self.checkpoint
        if max_tokens > checkpoint.max_length:
            raise ConfigError(
                f"max_tokens: {max_tokens} tokens (prompt and new ones) are more than "
                f"{checkpoint.name} was made for ({checkpoint.max_length})"
            )

    def encode(self, prompts: Sequence[Prompt]) -> tuple[list[list[int]], tuple[int, ...]]:
        """Token ids [batch, longest], left-padded, and how much padding each prompt got.

        Raises ConfigError for a prompt without a token, or with one that is none of the model's.
        """
        encoded: list[list[int]] = [
            list(self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
            for prompt in prompts
        ]
        known = range(self.checkpoint.vocab_size)
        if not all(token in known for tokens in encoded for token in tokens):
            raise ConfigError(f"prompt: its token ids must be from 0 to {known.stop - 1}")
        if not encoded or not all(encoded):
            raise ConfigError("prompt: must not be empty; write at least one word")
        longest = max(map(len, encoded))
        padding = tuple(longest - len(tokens) for tokens in encoded)
        pad = [self.checkpoint.pad_token_id]
        return [pad * n + tokens for n, tokens in zip(padding, encoded, strict=True)], padding

    def submit(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        max_length: int | None = None,
        save_to: Path | None = None,
    ) -> "GenerationHandle":
        """A generation for all prompts together, to be run by somebody's nursery.

        ``max_length`` bounds prompt and new tokens together, as in transformers; ``save_to`` is a
        file that is kept up to date with it. Raises ConfigError when the tokens do not fit the
        model, or leave no room for a new one.
        """
        token_ids, padding = self.encode(prompts)
        length = len(token_ids[0])
        if max_length is not None:
            if max_length <= length:
                raise ConfigError(
                    f"max_length: {max_length} leaves no room behind a prompt of {length} tokens"
                )
            params = dataclasses.replace(params, max_new_tokens=max_length - length)
        writing = Writing(length, params, SamplerState((False,) * len(token_ids)))
        new = self._new_session(length + params.max_new_tokens, token_ids, padding, writing)
        return self.resume(new, save_to=save_to)

    def resume(
        self, saved: SavedSession, *, prompt: str | None = None, save_to: Path | None = None
    ) -> "GenerationHandle":
        """The rest of what a saved session was writing, to be run by somebody's nursery.

        Raises ConfigError when it was writing nothing, is of another model, or its (first) text did
        not begin with ``prompt``.
        """
        self._check(saved)
        if saved.writing is None:
            raise ConfigError(
                "the saved session was writing nothing: there is no text to go on with"
            )
        if prompt is not None:
            [begun], _ = self.encode([prompt])
            if tuple(begun) != saved.token_ids[0][saved.padding[0] : saved.writing.begin]:
                raise ConfigError(
                    "PROMPT: the saved session began with another one; leave it out to go on, or "
                    "begin anew with another file"
                )
        return GenerationHandle(self, saved, saved.writing, save_to)


class GenerationHandle:
    """A generation that runs on its own. Made by ``submit`` and ``resume``."""

    def __init__(
        self,
        originator: Originator,
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
