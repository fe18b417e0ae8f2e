"""Commands as forks of a process that has imported everything: ``forkserver.py`` from our side."""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from petals.node.environment import MEMORY_TUNABLES, TORCH_SETTINGS

SERVER = Path(__file__).with_name("forkserver.py")
_SETTINGS = {
    **TORCH_SETTINGS,
    "OMP_NUM_THREADS": "1",
    "GLIBC_TUNABLES": MEMORY_TUNABLES,
}
"""What a command that is started afresh sets for itself before it imports torch, and one thread each:
many run at once."""


class ForkedProcess:
    """What of ``subprocess.Popen`` the tests need. The streams are text."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        ours, theirs = [], []
        for reads in (True, False, False):
            read, write = os.pipe()
            theirs.append(read if reads else write)
            ours.append(write if reads else read)
        self._status, status = os.pipe()
        # Else it would start itself anew to have the setting, which its server has.
        request = json.dumps({"argv": list(argv), "env": {**env, **_SETTINGS}}).encode()
        socket.send_fds(_server(), [request], [*theirs, status])
        for fd in (*theirs, status):
            os.close(fd)
        self.stdin: TextIO = os.fdopen(ours[0], "w", encoding="utf-8")
        self.stdout: TextIO = os.fdopen(ours[1], encoding="utf-8")
        self.stderr: TextIO = os.fdopen(ours[2], encoding="utf-8")
        self._told = b""
        self.returncode: int | None = None
        self.pid = int(self._line(None) or -1)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        with suppress(TimeoutError):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended. Raises TimeoutError."""
        if self.returncode is None:
            line = self._line(timeout)
            if line is None:
                raise TimeoutError
            self.returncode = int(line or -signal.SIGKILL)
            os.close(self._status)
        return self.returncode

    def communicate(self, text: str, timeout: float) -> tuple[int, str, str]:
        """Tell it ``text``; its exit code, and all that it has said. Raises TimeoutError."""
        said: dict[str, str] = {}
        readers = [
            threading.Thread(target=lambda: said.update(output=self.stdout.read())),
            threading.Thread(target=lambda: said.update(errors=self.stderr.read())),
        ]
        for reader in readers:
            reader.start()
        try:
            with suppress(BrokenPipeError):
                self.stdin.write(text)
                self.stdin.flush()
            with suppress(BrokenPipeError):
                self.stdin.close()
            code = self.wait(timeout)
        finally:
            self.kill()
            for reader in readers:
                reader.join()
            for pipe in (self.stdout, self.stderr):
                pipe.close()
        return code, said["output"], said["errors"]

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, whatever it does."""
        self.send_signal(signal.SIGKILL)

    def _line(self, timeout: float | None) -> bytes | None:
        """The next line about it; empty if there will be none, None after ``timeout`` seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._told:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._status], [], [], left)[0]:
                return None
            more = os.read(self._status, 64)
            if not more:
                return b""
            self._told += more
        line, self._told = self._told.split(b"\n", 1)
        return line


@functools.cache
def _server() -> socket.socket:
    """The socket of the server, which is started with the first command and ends with us."""
    measured = tempfile.TemporaryDirectory(prefix="petals-measured-")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-P", str(SERVER)],
            stdin=theirs.fileno(),
            env={**os.environ, **_SETTINGS, "PETALS_TEST_MEASURED": measured.name},
            start_new_session=True,
        )

    def end() -> None:
        ours.close()
        server.wait()
        measured.cleanup()

    atexit.register(end)
    return ours
