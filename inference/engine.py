"""The engine runs the steps of all sessions through its blocks, in rounds.

schedule → run → postprocess: ``schedule.py`` chooses what goes into a round, ``rounds.py`` runs it,
and here is everything around them: sessions, their queues, the KV cache's budget, retained
prefixes, futures. Rounds run on torch's thread (``torch_thread.py``), between the jobs of others.

Rules of this file: all state is under one lock; torch runs only on its thread and never under the
lock; futures complete outside of the lock. It knows nothing of peers: a session is an id, a
reservation of cache and a position; an originator is a name for whom to be fair to.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ..protocol.errors import LocalProtocolError
from ..protocol.prefix import PREFIX_ROWS, Label
from ..protocol.span import Span
from ..protocol.tensor import DType, WireTensor
from .cache import CachePool, SessionCache
from .gathering import Gathering
from .histogram import Histogram, HistogramFigures
from .model import Blocks
from .pace import Limits, Pace
from .prefix_rows import PrefixRows
from .prefix_store import PrefixStore
from .rounds import Outcome, Rounds
from .schedule import Priority, Schedule, Share
from .steps import EngineSession, Step
from .torch_thread import TorchThread

__all__ = ["Engine", "EngineStatistics", "Limits", "Priority", "Restored"]

MAX_QUEUED_STEPS = 8
"""Steps of one session that may wait: enough to keep it busy, more only hide a full node."""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """What the engine holds and has done."""

    sessions: int
    cache_tokens_total: int
    cache_tokens_used: int
    """Reserved by open sessions (and by closed ones whose last step still runs)."""
    prefix_tokens: int
    """Held of sessions that have ended, in what nobody has reserved."""
    prefix_hits: int
    """Sessions that began with rows that were here."""
    prefix_tokens_reused: int
    """Rows that they did not have to compute."""
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
    queued_seconds: float
    """Time that steps have waited for their first round, all together."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What a session begins with."""

    position: int
    """Tokens that the session holds now; 0 if nothing was known."""
    outputs: WireTensor | None
    """Their outputs ``[1, position, hidden]``; None if there are none."""


class Engine:
    """Runs ``blocks`` for many sessions. Every method may be called from any thread."""

    def __init__(
        self,
        blocks: Blocks,
        *,
        cache_tokens: int,
        thread: TorchThread | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``cache_tokens``: the KV cache budget, in tokens of one sequence.

        ``thread``: where torch runs; the engine makes its own, and ends it, if none is given.
        ``clock``: seconds, never going back.
        """
        self.blocks = blocks
        self.thread = thread or TorchThread()
        """Where torch runs: whoever else computes in this process does it here."""
        self._owns_thread = thread is None
        self._clock = clock
        self._lock = threading.Lock()
        limits = limits or Limits()
        self._pace = Pace(limits)
        self._schedule = Schedule(limits, self._pace)
        self._gathering = Gathering()
        self._runner = Rounds(blocks)
        self._pool = CachePool(cache_tokens)
        self._prefixes: PrefixStore[PrefixRows] = PrefixStore()
        self._sessions: dict[bytes, EngineSession] = {}
        self._waiting: dict[EngineSession, None] = {}
        """Sessions with steps that wait; between rounds those are all that there are."""
        self._queued = 0
        self._stopping = False
        self._steps = 0
        self._rounds = 0
        self._rows = 0
        self._prefix_hits = 0
        self._prefix_tokens_reused = 0
        self._histograms = {
            "round_rows": Histogram(
                "Rows computed together in a round.", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
            ),
            "round_seconds": Histogram("How long a round took.", _SECONDS),
            "step_queue_seconds": Histogram(
                "How long a step waited for its first round.", _SECONDS
            ),
        }
        cpu = blocks.device.type == "cpu"
        self._alone = self.thread.cores.alone if cpu else contextlib.nullcontext
        self.thread.attach(self._turn)

    def open(
        self,
        session_id: bytes,
        *,
        batch: int,
        max_tokens: int,
        padding: Sequence[int] = (),
        originator: str = "",
        priority: Priority = Priority.NORMAL,
        sampled_here: bool = False,
        prefixes: bool = False,
    ) -> None:
        """Open a session of ``batch`` sequences and reserve its cache.

        Row b's first ``padding[b]`` positions are left padding (``()`` is none). Originators are
        served fairly within a ``priority``. With ``prefixes`` (batch 1, no padding), the session
        may be restored from a prefix, and what its steps' keys name is kept for others; its outputs
        are then kept, too, while it lives. ``sampled_here``: its outputs go nowhere but to head and
        sampling on the engine's thread, and its next token comes from there.

        Raises CacheFull, or LocalProtocolError for arguments that make no sense, an id in use, or
        after shutdown.
        """
        cache = SessionCache(
            self.blocks.cache_shape, batch=batch, max_tokens=max_tokens, padding=padding
        )
        if prefixes and (batch != 1 or cache.unpadded_from):
            raise LocalProtocolError("prefixes are shared by single sequences without padding")
        shared = PrefixRows(cache, self.blocks.hidden_size) if prefixes else None
        with self._lock:
            if self._stopping:
                raise LocalProtocolError("the engine is shut down")
            if session_id in self._sessions:
                raise LocalProtocolError(f"session {session_id.hex()} is already open")
            reservation = self._pool.reserve(batch * max_tokens)
            self._prefixes.shrink(self._pool.free)
            self._sessions[session_id] = EngineSession(
                cache, reservation, originator, priority, shared, sampled_here
            )

    def restore(
        self, session_id: bytes, keys: Sequence[bytes], *, wire_dtype: DType, span: Span
    ) -> "Future[Restored]":
        """Let a session that has had no step yet begin with rows that are here already.

        ``keys[j - 1]`` is the key of ``PREFIX_ROWS * j`` positions; the longest that is known
        counts. The rows are copied, or taken over from a session that has ended and left hardly
        more of them; outputs are those that their first session was given, in ``wire_dtype``, through
        ``span``.

        Never raises; the future gives position 0 where there is nothing to begin with (also if the
        session is closed first), and has a LocalProtocolError for an unknown session.
        """
        with self._lock:
            session = self._sessions.get(session_id)
        if session is None:
            return _refused(f"session {session_id.hex()} is not open here")
        return self.thread.run_sliced(lambda: self._restore(session, tuple(keys), wire_dtype, span))

    def submit(
        self,
        session_id: bytes,
        *,
        position: int,
        hidden: WireTensor,
        wire_dtype: DType,
        span: Span,
        keys: Sequence[Label] = (),
        order: Sequence[int] = (),
    ) -> "Future[WireTensor]":
        """Queue a step: ``hidden`` ``[batch, rows, hidden]`` at ``position``, through ``span``.

        The future gives the output, of the same shape, in ``wire_dtype``. A position below what
        the session holds truncates it first. Rows that are padding give zeros and cost nothing.
        ``keys`` are ``(position, key)``, rising: once this step has been computed, the session's
        first ``position`` rows are known by ``key``, until a step goes back behind them. They
        count only in a session with ``prefixes``. ``order``: of what is held before ``position``,
        row b of the batch goes on from what row ``order[b]`` has, which has as much padding.

        Never raises; the future does: LocalProtocolError for an unknown session, a gap, a wrong
        shape, span or order, too many tokens, keys for other positions than the step's, or a queue
        that is full; RemoteProtocolError for input that is not finite; ModelError when computing fails
        or gives something not finite; CancelledError when the session is closed first. A step that
        was refused changes nothing; after one that failed while computing, the session holds
        ``position`` tokens.
        """
        now = self._clock()
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                return _refused(f"session {session_id.hex()} is not open here")
            if len(session.steps) >= MAX_QUEUED_STEPS:
                return _refused(f"session {session_id.hex()} has {MAX_QUEUED_STEPS} steps waiting")
            step = Step(
                session=session,
                originator=session.originator,
                priority=session.priority,
                span=span,
                batch=len(session.cache.lanes),
                rows=hidden.shape[1] if len(hidden.shape) == 3 else 1,
                since=now,
                owner=session,
                position=position,
                hidden=hidden,
                wire_dtype=wire_dtype,
                keys=tuple(keys),
                order=tuple(order),
            )
            session.steps.append(step)
            self._queued += 1
            self._waiting[session] = None
            self._gathering.came(session, now, self.thread.idle)
        self.thread.wake()
        return step.future

    def close(self, session_id: bytes) -> None:
        """End a session, at any time; closing one that isn't open does nothing.

        Steps that wait are cancelled. A step that runs ends with this round; the session's cache
        is freed then. Rows that are known by a key stay while nobody needs their room.
        """
        with self._lock:
            session = self._sessions.pop(session_id, None)
            if session is None:
                return
            abandoned = self._forget(session)
        self.thread.wake()  # a round may have been waiting for it
        for step in abandoned:
            step.abandon()

    def statistics(self) -> EngineStatistics:
        """A snapshot."""
        with self._lock:
            return EngineStatistics(
                sessions=len(self._sessions),
                cache_tokens_total=self._pool.tokens,
                cache_tokens_used=self._pool.used,
                prefix_tokens=self._prefixes.tokens,
                prefix_hits=self._prefix_hits,
                prefix_tokens_reused=self._prefix_tokens_reused,
                queued=self._queued,
                steps=self._steps,
                rounds=self._rounds,
                rows=self._rows,
                busy_seconds=self._histograms["round_seconds"].total,
                queued_seconds=self._histograms["step_queue_seconds"].total,
            )

    def histograms(self) -> dict[str, HistogramFigures]:
        """A snapshot of the sizes and times behind the statistics, by name."""
        with self._lock:
            return {name: histogram.figures() for name, histogram in self._histograms.items()}

    def shutdown(self, timeout: float = 5.0) -> bool:
        """Close all sessions and run no more rounds; False if one still runs after ``timeout``.

        Ends the thread if it is the engine's own. Such a thread ends by itself after its round and
        keeps no process alive.
        """
        with self._lock:
            self._stopping = True
            sessions = list(self._sessions.values())
            self._sessions.clear()
            abandoned = [step for session in sessions for step in self._forget(session)]
            self._prefixes.shrink(0)
        for step in abandoned:
            step.abandon()
        if self._owns_thread:
            return self.thread.shutdown(timeout)
        return self.thread.detach(self._turn, timeout)

    # --- under the lock -------------------------------------------------------------------------

    def _forget(self, session: EngineSession) -> list[Step]:
        """Mark ``session`` closed and take its waiting steps away."""
        session.closed = True
        self._gathering.forget(session)
        self._waiting.pop(session, None)
        abandoned = list(session.steps)
        session.steps.clear()
        self._queued -= len(abandoned)
        if not session.running:
            self._release(session)
        return abandoned

    def _release(self, session: EngineSession) -> None:
        """Free the cache of a closed session that no round uses, or retain what is labelled."""
        session.reservation.release()
        rows = session.shared
        if rows is None:
            return
        length = self._prefixes.labelled(rows)
        if self._prefixes.retain(rows, 0 if self._stopping else self._pool.free):
            self.thread.run_sliced(lambda: rows.keep(length))

    def _heads(self) -> list[Step]:
        """The oldest step of every session that has one; those no longer wanted are dropped."""
        heads = []
        for session in list(self._waiting):
            steps = session.steps
            while steps and steps[0].future.cancelled():
                steps.popleft()
                self._queued -= 1
            if steps:
                heads.append(steps[0])
            else:
                del self._waiting[session]
        return heads

    def _take_round(self, heads: Sequence[Step], now: float) -> list[Share[Step]]:
        shares = self._schedule.take(heads, now)
        for share in shares:
            session = share.step.owner
            if not share.step.started:
                self._histograms["step_queue_seconds"].observe(now - share.step.since)
            session.steps.popleft()
            session.running = True
            if not session.steps:
                del self._waiting[session]
        return shares

    def _settle(
        self, shares: Sequence[Share[Step]], outcome: Outcome, begin: float, end: float
    ) -> list[Step]:
        """Account for a round, label rows, put back what goes on. Gives steps to be abandoned."""
        self._rounds += 1
        self._rows += outcome.rows
        self._steps += len(outcome.results)
        self._histograms["round_rows"].observe(outcome.rows)
        self._histograms["round_seconds"].observe(end - begin)
        if outcome.rows and not outcome.errors:
            long_rows = sum(s.rows * s.step.batch for s in shares if s.step.rows > 1)
            blocks = len(shares[0].step.span)
            self._pace.ran(prefill_rows=long_rows, blocks=blocks, seconds=end - begin)
        abandoned = []
        for share in shares:
            step, session = share.step, share.step.owner
            session.running = False
            if session.shared is not None and step.started:
                self._label(step, session.shared, completed=step in outcome.results)
            if step in outcome.results or step in outcome.errors or not step.started:
                self._queued -= 1
                if step.rows == 1 and not session.steps and not session.closed:
                    idle = self.thread.idle if session.sampled_here else None
                    self._gathering.left(session, step.span, end, idle)
            elif session.closed:
                self._queued -= 1
                abandoned.append(step)
            else:
                step.since = begin
                session.steps.appendleft(step)
                self._waiting[session] = None
            if session.closed:
                self._release(session)
        return abandoned

    def _label(self, step: Step, rows: PrefixRows, *, completed: bool) -> None:
        """Take labels off the rows that ``step`` has cut; once it is complete, put on its own."""
        self._prefixes.cut(rows, min(step.position, rows.length))
        if completed:
            for position, key in step.keys:
                if position <= rows.length:
                    self._prefixes.label(rows, position, key)

    # --- on torch's thread ----------------------------------------------------------------------

    def _due(self, now: float) -> list[Share[Step]] | float | None:
        """The next round, or what ``torch_thread.Turn`` returns if there is none to run."""
        with self._lock:
            heads = self._heads()
            if not heads:
                return None
            spans = {step.span for step in heads}
            missed = max(self._pace.singles_seconds(len(span)) for span in spans)
            pause = self._gathering.wait(spans, missed, now, self.thread.idle)
            return pause if pause > 0 else self._take_round(heads, now)

    def _turn(self) -> float | None:
        """Run a round if one is due; see ``torch_thread.Turn``."""
        with self._lock:
            if not self._waiting:
                return None
        with self._alone():  # and not while results are given out: they make others compute
            begin = self._clock()
            shares = self._due(begin)
            if not isinstance(shares, list):
                return shares
            outcome = self._runner.run(shares)
        for step, output in outcome.results.items():
            if step.owner.shared is not None:
                step.owner.shared.append(step.position, output, step.span)
        end = self._clock()
        with self._lock:
            abandoned = self._settle(shares, outcome, begin, end)
        for step in abandoned:
            step.abandon()
        for step, output in outcome.results.items():
            step.future.set_result(output)
        for step, error in outcome.errors.items():
            step.future.set_exception(error)
        return 0.0

    def _restore(
        self, session: EngineSession, keys: Sequence[bytes], wire_dtype: DType, span: Span
    ) -> Generator[None, None, Restored]:
        nothing = Restored(0, None)
        rows = session.shared
        if rows is None or not rows.fresh:
            return nothing
        with self._lock:
            found = self._prefixes.find(keys[: session.cache.max_tokens // PREFIX_ROWS])
            if found is None or session.closed:
                return nothing
            source, position = found
            if (source.span, source.wire_dtype) != (span, wire_dtype):
                return nothing
            given_up = self._prefixes.give_up(source, position)
        if given_up:
            outputs = rows.take_over(source, position)
        else:
            copied = yield from rows.take_from(source, position)
            if copied is None:
                return nothing
            outputs = copied
        session.span = span
        with self._lock:
            if not session.closed:
                for count, key in enumerate(keys[: position // PREFIX_ROWS], start=1):
                    self._prefixes.label(rows, PREFIX_ROWS * count, key)
                self._prefix_hits += 1
                self._prefix_tokens_reused += position
        return Restored(position, outputs)


def _refused(reason: str) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_exception(LocalProtocolError(reason))
    return future
