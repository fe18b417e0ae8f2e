"""Turns of the nodes that share a machine's cores."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Protocol

import pytest
import torch
from petals.inference.checkpoint import open_checkpoint
from petals.inference.cores import Cores
from petals.inference.tensors import to_wire
from petals.protocol.span import Span
from petals.protocol.tensor import DType
from support.engines import serving
from support.tiny_bloom import save_bloom

LONG = 60.0
"""Seconds that no test lasts."""


@pytest.fixture(autouse=True)
def all_cores_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: os.cpu_count() or 1)


class MakeCores(Protocol):
    def __call__(self, *, patience: float = LONG, clock: Callable[[], float] = ...) -> Cores: ...


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeCores]:
    """Makes what a process has; all of one folder, and closed in the end."""
    with ExitStack() as stack:

        def made(*, patience: float = LONG, clock: Callable[[], float] = time.monotonic) -> Cores:
            return stack.enter_context(closing(Cores(tmp_path, patience=patience, clock=clock)))

        yield made


class Turns:
    """Threads, each as another process would be, and the order in which they had their turns."""

    def __init__(self, make: MakeCores) -> None:
        self.log: list[str] = []
        self._make = make
        self._threads: list[threading.Thread] = []

    def start(self, name: str) -> None:
        """Let ``name`` wait for a turn, and note it then."""

        def take() -> None:
            with cores.alone():
                self.log.append(name)

        cores = self._make()
        self._threads.append(threading.Thread(target=take, name=name))
        self._threads[-1].start()

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(LONG)
            assert not thread.is_alive()


def until_next_is_taken(folder: Path) -> None:
    """Wait until somebody is next."""
    [path] = folder.glob("*.next")
    deadline = time.monotonic() + LONG
    with path.open("a") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            fcntl.flock(file, fcntl.LOCK_UN)
            time.sleep(0.001)
    raise AssertionError("nobody waits for a turn")


def test_one_has_to_wait_until_the_other_has_had_its_turn(tmp_path: Path, make: MakeCores) -> None:
    turns = Turns(make)
    with make().alone():
        turns.start("second")
        until_next_is_taken(tmp_path)
        turns.log.append("first")
    turns.wait()
    assert turns.log == ["first", "second"]


def test_whoever_has_just_had_a_turn_is_behind_those_who_wait(
    tmp_path: Path, make: MakeCores
) -> None:
    turns, ours = Turns(make), make()
    with ours.alone():
        turns.start("waited")
        until_next_is_taken(tmp_path)
    with ours.alone():
        turns.log.append("again")
    turns.wait()
    assert turns.log == ["waited", "again"]


def test_a_turn_ends_with_what_is_raised_in_it(make: MakeCores) -> None:
    with pytest.raises(ZeroDivisionError):
        make().run(lambda: 1 // 0)
    assert make().run(lambda: 7) == 7


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """One that has its turn until it is ended."""
    code = (
        "import sys, torch; from pathlib import Path; from petals.inference.cores import Cores\n"
        "import os; torch.get_num_threads = os.cpu_count\n"
        f"with Cores(Path({str(folder)!r})).alone():\n"
        "    print('mine', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=-1, stdout=-1, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "mine\n"
            yield process
        finally:
            process.kill()


def test_a_process_that_is_killed_leaves_its_turn_to_others(
    tmp_path: Path, make: MakeCores
) -> None:
    turns = Turns(make)
    with other_process(tmp_path) as process:
        turns.start("ours")
        until_next_is_taken(tmp_path)
        assert turns.log == []
        process.kill()
        turns.wait()
    assert turns.log == ["ours"]


def test_one_that_is_stopped_is_waited_for_once_and_then_seldom(
    tmp_path: Path, make: MakeCores
) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.01
        return now[0]

    def seconds() -> float:
        before = now[0]
        with ours.alone():
            return now[0] - before

    ours = make(patience=1.0, clock=clock)
    with other_process(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        assert 1.0 <= seconds() < 1.1
        assert max(seconds() for _ in range(10)) < 0.1
        waits = []
        for _ in range(7):
            began = now[0]
            while seconds() < 1.0:
                pass
            waits.append(now[0] - began - 1.0)
        assert waits == sorted(waits)
        assert waits[-1] > 29.0
    assert seconds() < 0.1
    with ours.alone(), make(patience=0.0).alone():
        assert ours._without == 1.0  # all is well again


def test_who_uses_half_of_the_cores_takes_no_turns(
    tmp_path: Path, make: MakeCores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with make().alone():
        assert list(tmp_path.iterdir()) == []


def test_nodes_on_other_cores_are_not_waited_for(
    tmp_path: Path, make: MakeCores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    with make().alone():
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7}, raising=False)
        with make().alone():
            assert {path.name for path in tmp_path.glob("*.turn")} == {
                "cores-f.turn",
                "cores-f0.turn",
            }


def test_without_a_folder_there_are_no_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = Cores(tmp_path / "missing")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"petals-node-{os.getuid()}"
    folder.symlink_to(tmp_path)  # a trap of another user's
    trapped = Cores()
    with missing.alone(), trapped.alone():
        pass
    folder.unlink()
    with closing(Cores()) as ours:
        assert ours.run(lambda: 7) == 7
    assert folder.stat().st_mode & 0o777 == 0o700


def test_where_files_cannot_be_locked_there_are_no_turns(
    make: MakeCores, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    assert make().run(lambda: 7) == 7


def test_steps_that_come_while_a_node_waits_for_its_turn_are_in_one_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    checkpoint, span = open_checkpoint(save_bloom(tmp_path / "bloom")), Span(0, 5)
    hidden = to_wire(torch.randn((1, 1, 48)))
    with serving(checkpoint, span) as (engine,), closing(Cores(patience=LONG)) as another_node:
        for name in (b"a", b"b", b"c"):
            engine.open(name, batch=1, max_tokens=10)
        with another_node.alone():
            steps = [
                engine.submit(name, position=0, hidden=hidden, wire_dtype=DType.FLOAT32, span=span)
                for name in (b"a", b"b", b"c")
            ]
            until_next_is_taken(tmp_path / f"petals-node-{os.getuid()}")
            assert engine.statistics().rounds == 0
        for step in steps:
            step.result(LONG)
        assert engine.statistics().rounds == 1
