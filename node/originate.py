"""Turn prompts into text: the one implementation below the command line, Python and every face.

A ``Session`` is a ring with tokens: what has gone around, and the token sampled last, which goes
around with the next step. ``write`` extends it by a prompt and samples until an end. A
``GenerationHandle`` is a ``write`` that runs on its own while others look at it.
"""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar

import torch
import trio

from ..inference.checkpoint import Checkpoint
from ..inference.detokenizer import Detokenizer
from ..inference.head import Head, HeadRows
from ..inference.model import Ends
from ..inference.sampling import Sampler, SamplingParams
from ..inference.tensors import to_torch, to_wire
from ..protocol.chain import ChainState, SessionTerms
from ..protocol.errors import ConfigError, PetalsError
from ..protocol.frames import Hello
from ..protocol.routing import RouteHop
from ..protocol.swarm import Swarm
from ..protocol.tensor import DType, WireTensor
from .gaps import Router
from .network import Network
from .ring import Ring, new_session_id, open_ring
from .wakeup import Signal

T = TypeVar("T")


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
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What came out: of one prompt. Only what is new, not the prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """``length`` (max_new_tokens), ``eos`` (the model ended the text) or ``stop``."""
    tokens_per_second: float
    """Of decoding: tokens behind the first one over the time they took."""
    time_to_first_token: float
    """Seconds from the call to the first token, routing and prefill included."""
    route: tuple[RouteHop, ...]
    recoveries: int


class Session:
    """A ring and the tokens that it holds; keeps its KV cache over several calls of ``write``.

    Made by ``Originator.open_session``. One caller at a time.
    """

    def __init__(self, originator: "Originator", terms: SessionTerms) -> None:
        self.originator = originator
        """Its model, tokenizer and ends."""
        self._terms = terms
        self._tokens: list[list[int]] = [[] for _ in range(terms.batch)]
        """Per sequence, what has gone around, and behind it what goes next."""
        self._embedded: tuple[tuple[list[int], ...], WireTensor] | None = None
        """The tokens sampled last, one a sequence, and their embeddings."""
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

    def rewind(self, position: int) -> None:
        """Forget the tokens from ``position`` on, so that the text goes on differently there."""
        ring = self._running()
        if not 0 <= position < len(self._tokens[0]):
            raise ConfigError(
                f"position: {position} is not among the session's {len(self._tokens[0])} tokens"
            )
        for tokens in self._tokens:
            del tokens[position:]
        if position < ring.length:
            ring.rewind(position)

    async def forward(self, token_ids: Sequence[Sequence[int]], *, want: int = 1) -> torch.Tensor:
        """Send tokens [batch, rows] around behind those before.

        Returns the hidden states of the last ``want`` positions, [batch, want, hidden_size] in the
        wire dtype. Raises ConfigError when they do not fit the session, NoRoute when nobody serves
        some blocks.
        """
        ring = self._running()
        rows = len(token_ids[0]) + len(self._tokens[0]) - ring.length
        if rows > ring.room:
            raise ConfigError(
                f"{ring.length + rows} tokens do not fit this session of "
                f"{self._terms.max_tokens}; start a new one with more room"
            )
        for tokens, more in zip(self._tokens, token_ids, strict=True):
            tokens.extend(more)
        outputs = await ring.step(rows, want=want)
        tensors = [to_torch(output) for output in outputs]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)

    async def write(
        self,
        token_ids: Sequence[Sequence[int]],
        params: SamplingParams,
        on_tokens: Callable[[list[int]], Sequence[bool]],
    ) -> None:
        """Extend the session by a prompt [batch, rows] and then by sampled tokens.

        ``on_tokens`` gets every step's tokens, one per sequence, and says which sequences are to
        end there. Returns when all have ended or after ``max_new_tokens``.
        """
        compute, head = self.originator.compute, self.originator.head
        checkpoint = self.originator.checkpoint
        history = [[*old, *new] for old, new in zip(self._tokens, token_ids, strict=True)]
        sampler = Sampler(
            params,
            history,
            padding=self._terms.padding,
            eos_token_ids=checkpoint.eos_token_ids,
            pad_token_id=checkpoint.pad_token_id,
        )
        step = token_ids
        for _ in range(params.max_new_tokens):
            rows = head.add(await self.forward(step))

            # One crossing to torch's thread a token: what is sampled now goes around next.
            def sample(rows: HeadRows = rows) -> tuple[list[int], WireTensor]:
                tokens = sampler.sample(rows.logits()[:, -1])
                return tokens, self._embed_now([[token] for token in tokens])

            tokens, embeddings = await compute(sample)
            self._embedded = tuple([token] for token in tokens), embeddings
            for sequence, token in zip(self._tokens, tokens, strict=True):
                sequence.append(token)
            for row, ended in enumerate(on_tokens(tokens)):
                if ended:
                    sampler.finish(row)
            if all(sampler.finished):
                return
            step = [[] for _ in tokens]  # the sampled tokens are behind the old ones already

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
        if max_tokens > self.checkpoint.max_length:
            raise ConfigError(
                f"max_tokens: {max_tokens} tokens (prompt and new ones) are more than "
                f"{self.checkpoint.name} was made for ({self.checkpoint.max_length})"
            )
        terms = SessionTerms(
            session=new_session_id(),
            model=self.checkpoint.fingerprint,
            num_blocks=self.checkpoint.num_blocks,
            hidden_size=self.checkpoint.hidden_size,
            batch=batch,
            padding=tuple(padding) or (0,) * batch,
            max_tokens=max_tokens,
            wire_dtype=self._wire_dtype,
        )
        session = Session(self, terms)
        async with open_ring(
            terms,
            network=self._network,
            router=self._router,
            swarm=self._swarm,
            hello=self._hello,
            embed=session.embed,
            clock=self._clock,
            patience=self._patience,
        ) as ring:
            session.ring = ring
            try:
                yield session
            finally:
                session.ring = None

    def encode(self, prompts: Sequence[str]) -> tuple[list[list[int]], tuple[int, ...]]:
        """Token ids [batch, longest], left-padded, and how much padding each prompt got.

        Raises ConfigError for a prompt without a token.
        """
        encoded: list[list[int]] = [list(self.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        if not encoded or not all(encoded):
            raise ConfigError("prompt: must not be empty; write at least one word")
        longest = max(map(len, encoded))
        padding = tuple(longest - len(tokens) for tokens in encoded)
        pad = [self.checkpoint.pad_token_id]
        return [pad * n + tokens for n, tokens in zip(padding, encoded, strict=True)], padding

    def submit(
        self, prompts: Sequence[str], params: SamplingParams, *, max_length: int | None = None
    ) -> "GenerationHandle":
        """A generation for all prompts together, to be run by somebody's nursery.

        ``max_length`` bounds prompt and new tokens together, as in transformers. Raises ConfigError
        when they leave no room for a token.
        """
        token_ids, padding = self.encode(prompts)
        length = len(token_ids[0])
        if max_length is not None:
            if max_length <= length:
                raise ConfigError(
                    f"max_length: {max_length} leaves no room behind a prompt of {length} tokens"
                )
            params = dataclasses.replace(params, max_new_tokens=max_length - length)
        return GenerationHandle(self, token_ids, padding, params)


class GenerationHandle:
    """A generation that runs on its own. Made by ``submit``."""

    def __init__(
        self,
        originator: Originator,
        token_ids: list[list[int]],
        padding: tuple[int, ...],
        params: SamplingParams,
    ) -> None:
        self._originator = originator
        self._prompt = token_ids
        self._padding = padding
        self._params = params
        self._texts = [Detokenizer(originator.tokenizer, stop=params.stop) for _ in token_ids]
        self._new: list[list[int]] = [[] for _ in token_ids]
        self._reasons: list[str | None] = [None for _ in token_ids]
        self._pieces: list[str] = []
        self._state = GenerationState.QUEUED
        self._error: Exception | None = None
        self._changed = Signal()
        self._scope = trio.CancelScope()
        self._session: Session | None = None
        self._route: tuple[RouteHop, ...] = ()
        self._recoveries = 0
        self._created = trio.current_time()
        self._first: float | None = None
        self._latest = self._created

    def status(self) -> GenerationStatus:
        """How far it is."""
        self._look_at_ring()
        return GenerationStatus(
            state=self._state,
            tokens=max(map(len, self._new)),
            tokens_per_second=self._speed(),
            route=self._route,
            recoveries=self._recoveries,
            error=None if self._error is None else str(self._error),
        )

    def cancel(self) -> None:
        """Stop; what was generated so far stays in ``partial``."""
        self._scope.cancel()

    async def wait(self) -> None:
        """Return when it has ended, one way or another."""
        while not self._state.final:
            await self._changed.wait()

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
                finish_reason=reason or "length",
                tokens_per_second=self._speed(),
                time_to_first_token=(self._first or self._latest) - self._created,
                route=self._route,
                recoveries=self._recoveries,
            )
            for text, tokens, reason in zip(self._texts, self._new, self._reasons, strict=True)
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
        with self._scope:
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
        length = len(self._prompt[0])
        async with self._originator.open_session(
            length + self._params.max_new_tokens, batch=len(self._prompt), padding=self._padding
        ) as session:
            self._session = session
            try:
                self._state = GenerationState.ROUTING
                await session.write(self._prompt, self._params, self._take)
            finally:
                self._look_at_ring()
                self._session = None

    def _take(self, tokens: list[int]) -> list[bool]:
        """Take a step's tokens in; says which sequences have reached a stop."""
        self._latest = trio.current_time()
        if self._first is None:
            self._first = self._latest
        eos = self._originator.checkpoint.eos_token_ids
        for row, token in enumerate(tokens):
            if self._reasons[row] is not None:
                continue
            self._new[row].append(token)
            piece = self._texts[row].add(token)
            if token in eos:
                self._reasons[row] = "eos"
            elif self._texts[row].stopped:
                self._reasons[row] = "stop"
            if row == 0 and piece:
                self._pieces.append(piece)
        self._changed.notify()
        return [reason is not None for reason in self._reasons]

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
        self._recoveries = ring.recoveries
        if ring.state is ChainState.RUNNING:
            self._route = ring.route
            generating = self._first is not None
            self._state = GenerationState.GENERATING if generating else GenerationState.PREFILL
        elif self._route:
            self._state = GenerationState.RECOVERING

    def _speed(self) -> float:
        tokens = max(map(len, self._new))
        if self._first is None or tokens == 0:
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
