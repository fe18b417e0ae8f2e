"""The swarm that is tormented: real processes of ``petals-node run``, each behind a proxy.

Every process has its standard input from here (``--exit-with-stdin``), so none outlives this one.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

import trio
from petals.node.node import Node
from petals.protocol.announcement import PeerState
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
    whole: bool = True
    """Whether it serves; false from a fault on until an originator sees that it has healed."""
    peer_id: str = ""
    multiaddr: str = ""
    lives: int = 0
    """How many processes it had."""
    _process: subprocess.Popen[bytes] | None = None
    _logger: threading.Thread | None = None

    async def start(self) -> None:
        """Start a process, and wait until it serves."""
        self._spawn()
        with trio.fail_after(START_DEADLINE):
            event = await trio.to_thread.run_sync(self._wait_serving, abandon_on_cancel=True)
        if event is None:
            raise RuntimeError(f"{self.name} ended before it served; see {self.folder}")
        self.peer_id, self.multiaddr = str(event["peer_id"]), str(event["multiaddr"])

    def _spawn(self) -> None:
        self.lives += 1
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
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
            stderr=subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT},
            process_group=0,  # a Ctrl-C is ours; if we die, the kernel wakes and ends who is stopped
        )
        log = self.folder / f"log-{self.lives}.txt"
        self._logger = threading.Thread(target=_keep, args=(self._process.stderr, log), daemon=True)
        self._logger.start()

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
        if process is None:
            return
        process.kill()
        process.wait()
        assert self._logger is not None
        self._logger.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()

    async def serves(self, asker: Node) -> bool:
        """Whether it says that it serves, to a node that asks it as sessions would."""
        try:
            announcement, _ = await asker.describe(self.peer_id, [self.multiaddr])
        except PeerError:
            return False
        return announcement is not None and announcement.state is PeerState.ONLINE

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


def _keep(lines: IO[bytes], path: pathlib.Path) -> None:
    """Write what a process says to a file, with the time before it."""
    with path.open("wb", buffering=0) as log:
        for line in lines:
            log.write(f"{datetime.datetime.now(datetime.UTC):%H:%M:%S.%f} ".encode() + line)
