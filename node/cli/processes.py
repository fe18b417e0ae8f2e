"""Child processes of the demo: started, listened to, and surely gone afterwards.

Rules of this file: a child lives inside ``async with``; its standard input is a pipe whose other
end only we hold, so that it leaves (``--exit-with-stdin``) even if we are killed; it has a session
of its own, so that a terminal's Ctrl-C reaches us alone and we end the children in order.
"""

import codecs
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio

from ...protocol.errors import PetalsError
from . import failures
from .command import PREFIX

_GRACE = 6.0
"""Seconds that a child has to leave: a node takes 5 at most."""

_ERROR_TAIL = 4000
"""Characters kept of what a child said on standard error."""


class Child:
    """One running ``petals-node`` command."""

    def __init__(self, name: str, process: trio.Process) -> None:
        self.name = name
        self._process = process
        self._line = ""
        self._errors = ""
        self._errors_read = trio.Event()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def output(self) -> AsyncIterator[str]:
        """What it writes to standard output, as it comes, until it ends."""
        assert self._process.stdout is not None
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        while True:
            data = await self._process.stdout.receive_some()
            text = decoder.decode(data, final=not data)
            if text:
                yield text
            if not data:
                return

    async def wait_for(self, event: str) -> dict[str, Any]:
        """The next event of that name, of those that it writes as JSON, one a line."""
        assert self._process.stdout is not None
        while True:
            line, newline, rest = self._line.partition("\n")
            if newline:
                self._line = rest
                record: dict[str, Any] = json.loads(line)
                if record.get("event") == event:
                    return record
                continue
            data = await self._process.stdout.receive_some()
            if not data:
                await self.check_ended_well()
                raise PetalsError(f"{self.name} ended too early")
            self._line += data.decode()

    async def check_ended_well(self) -> None:
        """Wait for its end; raise with its own words if it failed."""
        code = await self._process.wait()
        if code != 0:
            await self._errors_read.wait()
            said = self._errors.strip().splitlines()[-1:] or [f"exit code {code}"]
            raise PetalsError(f"{self.name} failed: {said[0].removeprefix('petals-node: ')}")

    async def read_errors(self) -> None:
        """Keep the end of what it says on standard error; show it all when debugging."""
        assert self._process.stderr is not None
        async for data in self._process.stderr:
            text = data.decode(errors="replace")
            if failures.debugging():
                sys.stderr.write(text)
            self._errors = (self._errors + text)[-_ERROR_TAIL:]
        self._errors_read.set()

    def tell_to_leave(self) -> None:
        """Send it the signal to leave, if it still runs."""
        if self._process.returncode is None:
            self._process.terminate()

    async def end(self) -> None:
        """Tell it to leave, wait, and kill it if it does not."""
        assert self._process.stdin is not None
        self.tell_to_leave()
        await self._process.stdin.aclose()
        with trio.move_on_after(_GRACE):
            await self._process.wait()
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # whatever it started, too
            await self._process.wait()


def _environment() -> dict[str, str]:
    """Ours, but for the settings of our user: a child is told everything that it needs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    debug = os.environ.get(failures.DEBUG_VARIABLE)
    return (
        kept | {f"{PREFIX}CONFIG": os.devnull} | ({failures.DEBUG_VARIABLE: debug} if debug else {})
    )


@asynccontextmanager
async def child(
    name: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> AsyncIterator[Child]:
    """Run ``petals-node`` with ``arguments``; it is gone when the block ends."""
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-P", "-m", "petals.node", *arguments, "--exit-with-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**_environment(), **environment},
            start_new_session=True,
        )
        running = Child(name, process)
        nursery.start_soon(running.read_errors)
        try:
            yield running
        finally:
            with trio.CancelScope(shield=True):
                await running.end()
            nursery.cancel_scope.cancel()
