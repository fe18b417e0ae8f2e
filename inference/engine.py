"""The engine owns the device: it runs the steps of all sessions, in rounds, on one thread.

schedule → run → postprocess. A round is one ragged batch: the waiting one-row steps of all
sessions together, and at most one longer step (a prefill), of which it takes a piece of bounded
length, so that a long prompt holds nobody up. Steps of one session never overtake one another.

Rules of this file: all state is under one lock; torch runs only on the worker thread and never
under the lock; futures complete outside of the lock. It knows nothing of peers: a session is an
id, a reservation of cache and a position.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import ParamSpec

import torch

from ..protocol.errors import (
    LocalProtocolError,
    ModelError,
    PetalsError,
    RemoteProtocolError,
)
from ..protocol.span import Span
from ..protocol.tensor import DType, WireTensor
from .attention import LaneRows
from .cache import CachePool, Reservation, SessionCache
from .model import Blocks
from .tensors import to_torch, to_wire, torch_dtype

P = ParamSpec("P")

_PREFILL_ROWS = 512
"""Rows of a longer step that one round takes: enough for full speed, little enough to wait for."""


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """What the engine holds and has done."""

    sessions: int
    cache_tokens_total: int
    cache_tokens_used: int
    """Reserved by open sessions (and by closed ones whose last step still runs)."""
    queued: int
    """Steps that wait or run."""
    steps: int
    """Steps completed."""
    rounds: int
    """Batches run; fewer than steps when sessions share them."""
    rows: int
    """Rows (tokens of one sequence) computed, each through its session's blocks."""
    busy_seconds: float
    """Time spent computing."""


@dataclass(slots=True, eq=False)
class _Session:
    cache: SessionCache
    reservation: Reservation
    span: Span | None = None
    """Set by the first step; a session's blocks never change."""
    closed: bool = False


@dataclass(slots=True, eq=False)
class _Work:
    """A step, waiting or running."""

    session: _Session
    position: int
    hidden: WireTensor
    wire_dtype: DType
    span: Span
    future: Future[WireTensor] = field(default_factory=Future[WireTensor])
    started: bool = False
    input: torch.Tensor | None = None
    """``[batch, rows, hidden]`` on the device, from the first round on."""
    output: torch.Tensor | None = None
    """The same shape; filled round by round, 0 where there is padding."""
    done: int = 0
    """Rows computed in earlier rounds."""

    @property
    def rows(self) -> int:
        return self.hidden.shape[1] if len(self.hidden.shape) == 3 else 1

    @property
    def complete(self) -> bool:
        return self.done == self.rows

    def abandon(self) -> None:
        if not self.future.cancel() and not self.future.done():
            self.future.set_exception(CancelledError("the session was closed"))


@dataclass(slots=True)
class _Outcome:
    """What a round brought. Steps in neither dictionary go on in the next round."""

    results: dict[_Work, WireTensor] = field(default_factory=dict)
    errors: dict[_Work, PetalsError] = field(default_factory=dict)
    rows: int = 0


class Engine:
    """Runs ``blocks`` for many sessions. Every method may be called from any thread."""

    def __init__(
        self, blocks: Blocks, *, cache_tokens: int, prefill_rows: int = _PREFILL_ROWS
    ) -> None:
        """``cache_tokens``: the KV cache budget, in tokens of one sequence."""
        self.blocks = blocks
        self._prefill_rows = prefill_rows
        self._condition = threading.Condition()
        self._pool = CachePool(cache_tokens)
        self._sessions: dict[bytes, _Session] = {}
        self._queue: deque[_Work] = deque()
        self._round: list[_Work] = []
        self._stopping = False
        self._steps = 0
        self._rounds = 0
        self._rows = 0
        self._busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="petals-engine", daemon=True)
        self._thread.start()

    def open(
        self, session_id: bytes, *, batch: int, max_tokens: int, padding: Sequence[int] = ()
    ) -> None:
        """Open a session of ``batch`` sequences and reserve its cache.

        Row b's first ``padding[b]`` positions are left padding (``()`` is none). Raises CacheFull,
        or LocalProtocolError for arguments that make no sense, an id in use, or after shutdown.
        """
        cache = SessionCache(
            self.blocks.cache_shape, batch=batch, max_tokens=max_tokens, padding=padding
        )
        with self._condition:
            if self._stopping:
                raise LocalProtocolError("the engine is shut down")
            if session_id in self._sessions:
                raise LocalProtocolError(f"session {session_id.hex()} is already open")
            reservation = self._pool.reserve(batch * max_tokens)
            self._sessions[session_id] = _Session(cache, reservation)

    def submit(
        self,
        session_id: bytes,
        *,
        position: int,
        hidden: WireTensor,
        wire_dtype: DType,
        span: Span,
    ) -> "Future[WireTensor]":
        """Queue a step: ``hidden`` ``[batch, rows, hidden]`` at ``position``, through ``span``.

        The future gives the output, of the same shape, in ``wire_dtype``. A position below what
        the session holds truncates it first. Rows that are padding give zeros and cost nothing.

        Never raises; the future does: LocalProtocolError for an unknown session, a gap, a wrong
        shape or span or too many tokens; RemoteProtocolError for input that is not finite;
        ModelError when computing fails or gives something not finite; CancelledError when the
        session is closed first. A step that was refused changes nothing; after one that failed
        while computing, the session holds ``position`` tokens.
        """
        with self._condition:
            session = self._sessions.get(session_id)
            if session is not None:
                work = _Work(session, position, hidden, wire_dtype, span)
                self._queue.append(work)
                self._condition.notify()
                return work.future
        refused: Future[WireTensor] = Future()
        refused.set_exception(LocalProtocolError(f"session {session_id.hex()} is not open here"))
        return refused

    def close(self, session_id: bytes) -> None:
        """End a session, at any time; closing one that isn't open does nothing.

        Steps that wait are cancelled. A step that runs ends first; its cache is freed then.
        """
        with self._condition:
            session = self._sessions.pop(session_id, None)
            if session is None:
                return
            abandoned = self._forget(session)
        for work in abandoned:
            work.abandon()

    def statistics(self) -> EngineStatistics:
        """A snapshot."""
        with self._condition:
            return EngineStatistics(
                sessions=len(self._sessions),
                cache_tokens_total=self._pool.tokens,
                cache_tokens_used=self._pool.used,
                queued=len(self._queue) + len(self._round),
                steps=self._steps,
                rounds=self._rounds,
                rows=self._rows,
                busy_seconds=self._busy_seconds,
            )

    def shutdown(self, timeout: float = 5.0) -> bool:
        """Close all sessions and end the worker thread; False if it still computes after that.

        Such a thread ends by itself after its round and keeps no process alive.
        """
        with self._condition:
            self._stopping = True
            sessions = list(self._sessions.values())
            self._sessions.clear()
            abandoned = [work for session in sessions for work in self._forget(session)]
            self._condition.notify_all()
        for work in abandoned:
            work.abandon()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _forget(self, session: _Session) -> list[_Work]:
        """Under the lock: mark ``session`` closed and take its waiting steps off the queue."""
        session.closed = True
        if all(work.session is not session for work in self._round):
            session.reservation.release()
        abandoned = [work for work in self._queue if work.session is session]
        self._queue = deque(work for work in self._queue if work.session is not session)
        return abandoned

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._stopping)
                if self._stopping:
                    return
                self._round = take_round(self._queue)
            begin = time.perf_counter()
            outcome = self._run_round(self._round)
            self._postprocess(outcome, time.perf_counter() - begin)

    def _run_round(self, works: Sequence[_Work]) -> _Outcome:
        """Start the steps that are new, and compute a piece of each."""
        outcome = _Outcome()
        ready = []
        for work in works:
            if not work.started and not work.future.set_running_or_notify_cancel():
                continue
            work.started = True
            if _attempt(work, outcome, self._start, work):
                ready.append(work)
        together = bool(ready) and _attempt(ready[0], outcome, self._run_batch, ready, outcome)
        if not together and len(ready) > 1:  # find out whose fault it is
            del outcome.errors[ready[0]]
            for work in ready:
                _attempt(work, outcome, self._run_batch, [work], outcome)
        for work in ready:
            if work.complete and work not in outcome.errors:
                _attempt(work, outcome, _finish, work, outcome)
        return outcome

    def _start(self, work: _Work) -> None:
        """Check a step against its session and make room at its position."""
        if work.input is not None:
            return
        session, cache, shape = work.session, work.session.cache, work.hidden.shape
        if len(shape) != 3 or shape[0] != len(cache.lanes) or shape[2] != self.blocks.hidden_size:
            raise LocalProtocolError(
                f"hidden states must be [{len(cache.lanes)}, rows, {self.blocks.hidden_size}], "
                f"got shape {shape}"
            )
        if not self.blocks.span.covers(work.span) or (session.span or work.span) != work.span:
            raise LocalProtocolError(
                f"blocks {work.span} were asked for; loaded are {self.blocks.span}"
                + (f", and the session uses {session.span}" if session.span else "")
            )
        if not 0 <= work.position <= cache.position:
            raise LocalProtocolError(
                f"a step at position {work.position} leaves a gap: the session holds "
                f"{cache.position} tokens"
            )
        if work.position + shape[1] > cache.max_tokens:
            raise LocalProtocolError(
                f"{work.position + shape[1]} tokens in a session opened for {cache.max_tokens}"
            )
        hidden = to_torch(work.hidden, dtype=self.blocks.dtype, device=self.blocks.device)
        if not torch.isfinite(hidden).all():
            raise RemoteProtocolError("the hidden states received contain NaN or infinity")
        session.span = work.span
        cache.truncate(work.position)
        work.input, work.output = hidden, torch.zeros_like(hidden)

    def _run_batch(self, works: Sequence[_Work], outcome: _Outcome) -> None:
        """One ragged batch: the next rows of every step, all through the same blocks."""
        lanes, parts, places = [], [], []
        for work in works:
            assert work.input is not None and work.output is not None
            cache = work.session.cache
            begin, end = work.done, self._piece_end(work)
            for lane, lane_cache in enumerate(cache.lanes):
                first = begin + cache.padding_rows(lane, work.position + begin, end - begin)
                if first < end:
                    lanes.append(LaneRows(lane_cache, end - first))
                    parts.append(work.input[lane, first:end])
                    places.append(work.output[lane, first:end])
        if lanes:
            plan = self.blocks.plan(lanes)
            output = self.blocks.run(torch.cat(parts)[None], plan, works[0].span)[0]
            start = 0
            for place in places:
                place.copy_(output[start : start + len(place)])
                start += len(place)
        for work in works:
            work.done = self._piece_end(work)
            work.session.cache.advance(work.position + work.done)
        outcome.rows += sum(lane.rows for lane in lanes)

    def _piece_end(self, work: _Work) -> int:
        """Up to which of its rows this round computes a step."""
        return min(work.rows, work.done + max(1, self._prefill_rows // work.hidden.shape[0]))

    def _postprocess(self, outcome: _Outcome, seconds: float) -> None:
        """Account for the round, put back unfinished steps, complete the others."""
        for work in outcome.errors:
            if work.input is not None:  # a step refused unstarted has changed nothing
                work.session.cache.truncate(work.position)
        abandoned = []
        with self._condition:
            works, self._round = self._round, []
            self._rounds += 1
            self._rows += outcome.rows
            self._steps += len(outcome.results)
            self._busy_seconds += seconds
            for work in reversed(works):
                if work.session.closed:
                    work.session.reservation.release()
                if work in outcome.results or work in outcome.errors or not work.started:
                    continue
                if work.session.closed:
                    abandoned.append(work)
                else:
                    self._queue.appendleft(work)
        for work in abandoned:
            work.abandon()
        for work, output in outcome.results.items():
            work.future.set_result(output)
        for work, error in outcome.errors.items():
            work.future.set_exception(error)


def _attempt(
    work: _Work, outcome: _Outcome, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs
) -> bool:
    """Do ``action`` for ``work``; whatever it raises is the outcome of ``work``."""
    try:
        action(*args, **kwargs)
    except PetalsError as error:
        outcome.errors[work] = error
        return False
    # torch reports memory and device errors in many classes; none may end the thread.
    except Exception as error:  # noqa: BLE001
        outcome.errors[work] = ModelError(f"computing blocks {work.span} failed: {error}")
        return False
    return True


def _finish(work: _Work, outcome: _Outcome) -> None:
    """Bring the output of a complete step into its wire dtype."""
    assert work.output is not None
    output = work.output.to(torch_dtype(work.wire_dtype))
    if not torch.isfinite(output).all():
        if torch.isfinite(work.output).all():
            raise ModelError(f"the output of blocks {work.span} is too large for {work.wire_dtype}")
        raise ModelError(f"blocks {work.span} gave NaN or infinity")
    outcome.results[work] = to_wire(output)


def take_round(queue: deque[_Work]) -> list[_Work]:
    """Take the next round off ``queue``, oldest first.

    The oldest step is always in it, so nobody starves. With it go all waiting one-row steps for
    the same blocks, and one longer step; never two of one session, and never a step whose
    session has an older one waiting.
    """
    span = queue[0].span
    taken: list[_Work] = []
    left: list[_Work] = []
    seen: set[int] = set()
    prefill = False
    for work in queue:
        longer = work.rows > 1
        fits = work.span == span and id(work.session) not in seen and not (longer and prefill)
        seen.add(id(work.session))
        (taken if fits else left).append(work)
        prefill |= fits and longer
    queue.clear()
    queue.extend(left)
    return taken
