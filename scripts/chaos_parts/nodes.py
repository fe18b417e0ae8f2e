"""The swarm that is tormented: real processes of ``petals-node run``, each behind a proxy.

Every process has its standard input from here (``--exit-with-stdin``), so none outlives this one.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

import trio
from petals.node.node import Node
from petals.protocol.errors import PeerError

from .proxy import HOST, Proxy, free_port

START_DEADLINE = 180.0
"""Seconds until a node serves, on a machine that is busy with all the others."""
LEAVE_DEADLINE = 15.0
IDLE = ("sessions", "engine_sessions", "cache_tokens_used", "steps_queued")
"""Figures of a node that must be 0 when there are no sessions."""
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


@dataclass(eq=False)
class TormentedNode:
    """One place in the swarm: a span, and the process that serves it now."""

    name: str
    span: str | None
    """None: the bootstrap peer, which is left alone."""
    proxy: Proxy
    folder: pathlib.Path
    """Data and logs."""
    options: tuple[str, ...]
    whole: bool = False
    """Whether it serves, as far as we have hurt it."""
    peer_id: str = ""
    multiaddr: str = ""
    lives: int = 0
    """How many processes it had."""
    _process: subprocess.Popen[bytes] | None = None
    _log: IO[bytes] | None = field(default=None, repr=False)

    async def start(self) -> None:
        """Start a process, and wait until it serves."""
        self._spawn()
        with trio.fail_after(START_DEADLINE):
            event = await trio.to_thread.run_sync(self._wait_serving, abandon_on_cancel=True)
        if event is None:
            raise RuntimeError(f"{self.name} ended before it served; see {self.folder}")
        self.peer_id, self.multiaddr = str(event["peer_id"]), str(event["multiaddr"])
        self.whole = True

    def _spawn(self) -> None:
        self.lives += 1
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        self._log = (self.folder / f"log-{self.lives}.txt").open("wb")
        command = [sys.executable, "-P", "-m", "petals.node", "run", "--json", "--debug"]
        command += ["--exit-with-stdin", "--data-dir", str(data), *self.options]
        command += ["--listen", f"/ip4/{HOST}/tcp/{self.proxy.target}"]
        command += ["--announce", f"/ip4/{HOST}/tcp/{self.proxy.port}"]
        if self.span is not None:
            command += ["--blocks", self.span]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,
        )

    def _wait_serving(self) -> dict[str, object] | None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            event: dict[str, object] = json.loads(line)
            if event["event"] == "serving":
                return event
        return None

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def gone(self) -> None:
        """Wait until the process has ended; one that does not leave is killed."""
        process = self._process
        assert process is not None
        with trio.move_on_after(LEAVE_DEADLINE):
            await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
        self.end()

    def forget_key(self) -> None:
        """The next process is another peer."""
        (self.folder / "data" / "identity.pem").unlink(missing_ok=True)

    def end(self) -> None:
        """Kill the process, if it still runs, and take its things away."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    async def figures(self, asker: Node) -> Mapping[str, float]:
        """Its own figures; none if it does not answer."""
        try:
            _, figures = await asker.describe(self.peer_id, [self.multiaddr])
        except PeerError:
            return {}
        return figures


async def make_node(
    name: str,
    span: str | None,
    folder: pathlib.Path,
    nursery: trio.Nursery,
    *options: str,
) -> TormentedNode:
    """A node that is not started yet, and its proxy, which runs in ``nursery``."""
    proxy = Proxy(free_port())
    await nursery.start(proxy.run)
    return TormentedNode(name, span, proxy, folder / name, options)
