"""Turn prompts into text: the one implementation below the command line, Python and every face.

A ``Session`` is a ring with tokens: what has gone around, and the token sampled last, which goes
around with the next step. ``write`` extends it by a prompt and samples until an end; if it is broken
off (nobody serves some blocks, it is cancelled, the process dies), ``go_on`` is the rest of it. A
``GenerationHandle`` (``generation.py``) is a ``write`` that runs on its own while others look at it.

At any time between two tokens a session can be saved (``saved_session.py``): with its last token a
``Session`` keeps the sampler's state behind that token, whatever the sampler is doing meanwhile. So
there is one way to go on, from tokens and a state, and a new session is one without tokens.
"""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import trio

from ..inference.checkpoint import Checkpoint
from ..inference.head import Head, HeadRows
from ..inference.model import Ends
from ..inference.sampling import Sampler, SamplerState, SamplingParams, TokenLogprobs
from ..inference.tensors import to_wire
from ..protocol.chain import SessionTerms
from ..protocol.errors import ConfigError, LocalProtocolError, PetalsError
from ..protocol.frames import Hello
from ..protocol.span import Span
from ..protocol.swarm import Swarm
from ..protocol.tensor import DType, WireTensor
from . import saved_session
from .gaps import Router
from .generation import GenerationHandle
from .hidden_session import HiddenSession
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
            rows = head.add(await self._step(want=1), largest_only=sampler.largest_only)

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
        return await ring.step(length - ring.length, want=want)

    def embed(self, start: int, stop: int) -> WireTensor | Callable[[], Awaitable[WireTensor]]:
        """The embeddings [batch, stop - start, hidden_size] of positions of this session."""
        token_ids = tuple(tokens[start:stop] for tokens in self._tokens)
        if self._embedded is not None and self._embedded[0] == token_ids:
            return self._embedded[1]
        return partial(self.originator.compute, partial(self._embed_now, token_ids))

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
        async with self._running(session, terms, session.embed):
            yield session

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
        async with self._running(session, terms, session.read):
            yield session

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

    @contextlib.asynccontextmanager
    async def _running(
        self, session: Session | HiddenSession, terms: SessionTerms, embed: EmbedRows
    ) -> AsyncIterator[None]:
        """Give ``session`` a ring for as long as it is open."""
        async with open_ring(
            terms,
            network=self._network,
            router=self._router,
            swarm=self._swarm,
            hello=self._hello,
            embed=embed,
            clock=self._clock,
            patience=self._patience,
        ) as ring:
            session.ring = ring
            try:
                yield
            finally:
                session.ring = None

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
