"""The one thread that runs torch in this process.

torch spreads each operation over all cores, so two threads that run it at once only take the cores
from each other. Worse, whoever computes first in a process owns the threads of torch's libraries: on
any other thread, MKL's batched products then run on one core, and OpenMP's pool wakes up slower
(measured: rounds took 1.4 to 1.6 times as long). Everything that computes goes through here: the rounds of an engine, and the jobs
of everybody else (embedding, head and sampling, loading a model). What other processes do to it is in
``cores.py``.

Rules of this file: jobs run in the order in which they came. Between two rounds run the jobs that
were waiting then, and no more: a job waits for one round at most, and jobs never keep rounds from
running for longer than they take. Importing this file imports no torch.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future
from typing import Any, Protocol, TypeVar

from ..protocol.errors import LocalProtocolError
from .cores import Cores

T = TypeVar("T")


class Turn(Protocol):
    """What runs in rounds between the jobs, one round at each call."""

    def __call__(self) -> float | None:
        """Run a round if one is due; must not raise.

        Returns the seconds after which to ask again if nothing else happens before (0: at once),
        or None: not before ``TorchThread.wake``.
        """
        ...


class _Job:
    """A function that runs, or one that runs slice by slice."""

    def __init__(self, function: Callable[[], Any], *, sliced: bool) -> None:
        self.future: Future[Any] = Future()
        self._function = function
        self._sliced = sliced
        self._slices: Generator[None, None, Any] | None = None

    def run(self) -> bool:
        """Run it, or its next slice; False once its future is complete."""
        try:
            if self._slices is None:
                if not self.future.set_running_or_notify_cancel():
                    return False
                result = self._function()
                if not self._sliced:
                    self.future.set_result(result)
                    return False
                self._slices = result
            next(self._slices)
        except StopIteration as end:
            self.future.set_result(end.value)
            return False
        # As in concurrent.futures: whatever a job raises is its caller's, never the thread's end.
        except BaseException as error:  # noqa: BLE001
            self.future.set_exception(error)
            return False
        return True

    def abandon(self) -> None:
        """The thread ends before the job does."""
        if not self.future.cancel() and not self.future.done():
            self.future.set_exception(CancelledError("torch's thread was shut down"))


class TorchThread:
    """A daemon thread, started with the first work. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.cores = Cores()
        """For what computes on this thread, for as long as a round and on a CPU."""
        self._condition = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._turns: tuple[Turn, ...] = ()
        self._awake = False
        self._stopping = False
        self._idle = 0.0
        self._idle_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="petals-torch", daemon=True)

    def run(self, function: Callable[[], T]) -> "Future[T]":
        """Run ``function`` on the thread; the future gives what it returns or raises.

        A job whose future is cancelled before it begins is not run. Never raises; after
        ``shutdown`` the future has a LocalProtocolError.
        """
        return self._add(_Job(function, sliced=False))

    def run_sliced(self, function: Callable[[], Generator[None, None, T]]) -> "Future[T]":
        """As ``run``, for a longer job: a round, and other jobs, may run at each of its yields.

        The future gives what the generator returns.
        """
        return self._add(_Job(function, sliced=True))

    def attach(self, turn: Turn) -> None:
        """Ask ``turn`` for rounds from now on. Raises LocalProtocolError after ``shutdown``."""
        with self._condition:
            if self._stopping:
                raise LocalProtocolError("torch's thread is shut down")
            self._turns = (*self._turns, turn)
            self._awake = True
            self._notify()

    def detach(self, turn: Turn, timeout: float) -> bool:
        """Ask ``turn`` no more; False if its last round has not ended in ``timeout`` seconds.

        From the thread itself nothing is waited for: that round is the caller's own.
        """
        with self._condition:
            self._turns = tuple(other for other in self._turns if other != turn)
            if threading.current_thread() is self._thread:
                return True
            if self._stopping or not self._thread.is_alive():
                behind_it = None
            else:
                job = _Job(_nothing, sliced=False)
                self._jobs.append(job)
                self._notify()
                behind_it = job.future
        if behind_it is None:
            return self._join(timeout)
        try:
            behind_it.exception(timeout)
        except TimeoutError:
            return False
        except CancelledError:  # by a shutdown beside us
            return self._join(timeout)
        return True

    @property
    def idle(self) -> float:
        """Seconds for which it has had nothing to do so far."""
        since = self._idle_since
        return self._idle + (0.0 if since is None else time.monotonic() - since)

    def wake(self) -> None:
        """Something has changed for what is attached: ask it again."""
        with self._condition:
            if not self._awake:
                self._awake = True
                self._condition.notify()

    def shutdown(self, timeout: float = 5.0) -> bool:
        """Cancel the jobs that wait and end the thread; False if it still computes after that.

        Such a thread ends by itself after its job or round and keeps no process alive.
        """
        with self._condition:
            self._stopping = True
            jobs, self._jobs = self._jobs, deque()
            self._turns = ()
            self._condition.notify()
        for job in jobs:
            job.abandon()
        return self._join(timeout)

    def _add(self, job: _Job) -> Future[Any]:
        with self._condition:
            if not self._stopping:
                self._jobs.append(job)
                self._notify()
                return job.future
        job.future.set_exception(LocalProtocolError("torch's thread is shut down"))
        return job.future

    def _notify(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._condition.notify()

    def _join(self, timeout: float) -> bool:
        if self._thread.ident is None or threading.current_thread() is self._thread:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        with contextlib.closing(self.cores):
            self._work_on()

    def _work_on(self) -> None:
        _compute_without_denormals()
        pause: float | None = None
        while True:
            with self._condition:
                if not (self._jobs or self._awake or self._stopping) and pause != 0:
                    self._idle_since = begin = time.monotonic()
                    self._condition.wait(pause)
                    self._idle_since, end = None, time.monotonic()
                    self._idle += end - begin
                if self._stopping:
                    return
                self._awake = False
                jobs, turns = len(self._jobs), self._turns
            for _ in range(jobs):
                self._run_job()
            pauses = [pause for turn in turns if (pause := turn()) is not None]
            pause = min(pauses, default=None)

    def _run_job(self) -> None:
        with self._condition:
            if not self._jobs:  # shut down meanwhile
                return
            job = self._jobs.popleft()
        if job.run():
            with self._condition:
                if not self._stopping:
                    self._jobs.append(job)
                    return
            job.abandon()


def _compute_without_denormals() -> None:
    """Let this thread, and the library threads that it starts, take denormal numbers for zero.

    With ALiBi the softmax of a long context has many, and arithmetic on them takes a hundred times
    as long: attention took most of a prefill's time. None is large enough to change a float32 sum.
    """
    import torch  # here, for the rule above

    torch.set_flush_denormal(True)


def _nothing() -> None:
    """Run behind a round, to see that it has ended."""
