"""Jobs and rounds on one thread: their order, their ends, and what happens to those not begun."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError

import pytest
import torch
from petals.inference.torch_thread import TorchThread
from petals.protocol.errors import LocalProtocolError


@pytest.fixture
def thread() -> Iterator[TorchThread]:
    thread = TorchThread()
    yield thread
    assert thread.shutdown(), "torch's thread did not end"


class Holder:
    """A job or a round that lasts until it is let go."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go = threading.Event()

    def __call__(self) -> None:
        self.began.set()
        assert self.go.wait(60)


def hold(thread: TorchThread) -> Holder:
    """Keep ``thread`` busy with a job, so that more can queue behind it."""
    holder = Holder()
    thread.run(holder)
    assert holder.began.wait(60)
    return holder


def rounds(count: int, log: list[str]) -> Callable[[], float | None]:
    """A turn with ``count`` rounds to run."""
    left = iter(range(count))

    def turn() -> float | None:
        number = next(left, None)
        if number is None:
            return None
        log.append(f"round {number}")
        return 0.0

    return turn


def test_jobs_run_in_order_on_one_daemon_thread_that_starts_with_the_first(
    thread: TorchThread,
) -> None:
    before = threading.active_count()
    log: list[int] = []
    futures = [thread.run(lambda n=n: log.append(n)) for n in range(20)]  # type: ignore[misc]
    for future in futures:
        future.result(timeout=60)
    assert log == list(range(20))
    worker = thread.run(threading.current_thread).result(timeout=60)
    assert worker.daemon and worker.name == "petals-torch"
    assert threading.active_count() == before + 1


def test_what_a_job_raises_is_its_callers(thread: TorchThread) -> None:
    def fail() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        thread.run(fail).result(timeout=60)
    assert thread.run(lambda: 5).result(timeout=60) == 5


def test_a_cancelled_job_is_not_run(thread: TorchThread) -> None:
    holder = hold(thread)
    ran: list[str] = []
    unwanted = thread.run(lambda: ran.append("unwanted"))
    wanted = thread.run(lambda: ran.append("wanted"))
    assert unwanted.cancel()
    holder.go.set()
    wanted.result(timeout=60)
    assert ran == ["wanted"]


def test_a_job_waits_for_one_round_at_most_and_rounds_are_not_starved(thread: TorchThread) -> None:
    log: list[str] = []
    holder = hold(thread)
    done = threading.Event()
    turn = rounds(3, log)

    def last() -> None:
        log.append("second job")
        done.set()

    def first() -> None:
        log.append("first job")
        thread.run(last)  # comes behind a round, however many jobs make jobs

    thread.attach(turn)
    thread.run(first)
    holder.go.set()
    assert done.wait(60)
    assert log[:3] == ["first job", "round 0", "second job"]


def test_a_turn_is_asked_again_when_it_said_or_when_woken(thread: TorchThread) -> None:
    asked = threading.Semaphore(0)
    pauses: list[float | None] = [None, 0.0, 0.001, None]

    def turn() -> float | None:
        asked.release()
        return pauses.pop(0) if pauses else None

    thread.attach(turn)
    assert asked.acquire(timeout=60)
    thread.run(lambda: None).result(timeout=60)
    while pauses:
        thread.wake()
        assert asked.acquire(timeout=60)


def test_a_sliced_job_lets_rounds_and_jobs_in_between(thread: TorchThread) -> None:
    log: list[str] = []

    def work() -> Generator[None, None, str]:
        for number in range(3):
            log.append(f"slice {number}")
            yield
        return "whole"

    holder = hold(thread)
    sliced = thread.run_sliced(work)
    short = thread.run(lambda: log.append("job"))
    holder.go.set()
    assert sliced.result(timeout=60) == "whole"
    short.result(timeout=60)
    assert log == ["slice 0", "job", "slice 1", "slice 2"]


def test_a_sliced_job_that_fails_or_is_cancelled(thread: TorchThread) -> None:
    def fail() -> Generator[None, None, None]:
        yield
        raise ValueError("in the second slice")

    with pytest.raises(ValueError, match="in the second slice"):
        thread.run_sliced(fail).result(timeout=60)
    holder = hold(thread)
    unwanted = thread.run_sliced(fail)
    assert unwanted.cancel()
    holder.go.set()
    assert thread.run(lambda: 1).result(timeout=60) == 1


def test_shutdown_cancels_what_has_not_begun_and_lets_the_rest_end() -> None:
    thread = TorchThread()
    holder = hold(thread)
    waiting = thread.run(lambda: 1)
    assert not thread.shutdown(timeout=0), "a job is never cut short"
    assert waiting.cancelled()
    late = thread.run(lambda: 1).exception(timeout=60)
    assert isinstance(late, LocalProtocolError) and "shut down" in str(late)
    with pytest.raises(LocalProtocolError, match="shut down"):
        thread.attach(lambda: None)
    holder.go.set()
    assert thread.shutdown()


def test_shutdown_ends_a_sliced_job_behind_its_slice() -> None:
    thread = TorchThread()
    holder = Holder()

    def work() -> Generator[None, None, None]:
        holder()
        yield
        raise AssertionError("never reached")

    future = thread.run_sliced(work)
    assert holder.began.wait(60)
    assert not thread.shutdown(timeout=0)
    holder.go.set()
    assert thread.shutdown()
    with pytest.raises(CancelledError):
        future.result(timeout=60)


def test_shutdown_of_a_thread_that_never_worked_or_by_itself() -> None:
    assert TorchThread().shutdown()
    thread = TorchThread()
    assert thread.run(thread.shutdown).result(timeout=60)


def test_detaching_waits_for_the_last_round(thread: TorchThread) -> None:
    holder = Holder()

    def turn() -> float | None:
        holder()
        return 0.0

    thread.attach(turn)
    assert holder.began.wait(60)
    assert not thread.detach(turn, timeout=0)
    holder.go.set()
    assert thread.detach(turn, timeout=60)
    holder.began.clear()
    thread.wake()
    thread.run(lambda: None).result(timeout=60)
    assert not holder.began.is_set()


def test_detaching_from_the_thread_itself_or_after_its_end() -> None:
    thread = TorchThread()
    turn = rounds(0, [])
    thread.attach(turn)
    assert thread.run(lambda: thread.detach(turn, 60)).result(timeout=60)
    thread.attach(turn)
    assert thread.shutdown()
    assert thread.detach(turn, timeout=60)


def test_it_is_idle_while_it_has_nothing_to_do(thread: TorchThread) -> None:
    def working() -> tuple[float, float]:
        before = thread.idle
        torch.ones(1000).sum()
        return before, thread.idle

    before, after = thread.run(working).result(60)
    assert before == after
    deadline = time.monotonic() + 60
    while thread.idle <= after:
        assert time.monotonic() < deadline, "it was never idle again"


def test_denormal_numbers_are_zero_on_it(thread: TorchThread) -> None:
    """Arithmetic on them would take a hundred times as long, and softmax is full of them."""
    least = torch.full((64,), 1e-38)

    def left_of_a_tenth() -> int:
        return int((least / 10).count_nonzero())

    assert left_of_a_tenth() == 64
    assert thread.run(left_of_a_tenth).result(timeout=60) == 0
