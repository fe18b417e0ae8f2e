"""Sessions that decode by themselves, as those of many originators do at one node.

Each sends its next row as soon as it has the last one's output, whatever the others do: what then
shares a round is the engine's own doing.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from petals.inference.tensors import to_wire
from petals.protocol.tensor import WireTensor

from .local import DEADLINE, LocalSession, noise


class Driven:
    """Some open sessions, decoding through the blocks until told to stop."""

    def __init__(self, sessions: Sequence[LocalSession], *, tokens: int | None = None) -> None:
        """``tokens``: stop when every session has as many. Nobody stops before the others."""
        self._sessions = sessions
        self._tokens = tokens
        local = sessions[0].local
        self._hidden = to_wire(noise(local, 1), local.wire_dtype)
        self._lock = threading.Lock()
        self._running = len(sessions)
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self.times: list[list[float]] = [[] for _ in sessions]
        """When each session's tokens came, by ``time.perf_counter``."""

    def start(self) -> None:
        """Every session sends its first row."""
        for number in range(len(self._sessions)):
            self._send(number)

    def stop(self) -> None:
        """No session sends another row."""
        self._stopping.set()

    def wait_until_each_has(self, tokens: int) -> None:
        """Until every session has decoded as many tokens since ``start``."""
        deadline = time.monotonic() + DEADLINE
        while min(map(len, self.times)) < tokens and not self._ended.wait(0.001):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{tokens} tokens a session took over {DEADLINE:.0f} s")

    def wait(self) -> None:
        """Until all sessions have stopped. Raises what made one of them fail."""
        if not self._ended.wait(DEADLINE):
            raise TimeoutError(f"sessions did not stop within {DEADLINE:.0f} s")
        if self._error is not None:
            raise self._error

    def _send(self, number: int) -> None:
        future = self._sessions[number].submit(self._hidden)
        future.add_done_callback(lambda done: self._received(number, done))

    def _received(self, number: int, done: Future[WireTensor]) -> None:
        """On the engine's thread."""
        now = time.perf_counter()
        error = done.exception()
        self.times[number].append(now)
        if error is not None:
            self._error = error
            self._stopping.set()
        if self._tokens is not None and min(map(len, self.times)) >= self._tokens:
            self._stopping.set()
        if not self._stopping.is_set():
            self._send(number)
            return
        with self._lock:
            self._running -= 1
            if self._running == 0:
                self._ended.set()


def rates(sessions: Sequence[LocalSession], tokens: int) -> list[float]:
    """Tokens per second of each session while they all decode; their lengths stay."""
    lengths = [session.length for session in sessions]
    driven = Driven(sessions, tokens=tokens + 1)
    driven.start()
    driven.wait()
    for session, length in zip(sessions, lengths, strict=True):
        session.length = length
    return [(len(times) - 1) / (times[-1] - times[0]) for times in driven.times]


def gaps(times: Sequence[float], since: float) -> list[float]:
    """Seconds between one token and the next, of those that ended after ``since``."""
    return [after - before for before, after in itertools.pairwise(times) if after > since]


def typical_gap(times: Sequence[Sequence[float]], until: float) -> float:
    """The median of all sessions' gaps that ended before ``until``."""
    return statistics.median(
        after - before
        for one in times
        for before, after in itertools.pairwise(one)
        if after <= until
    )
