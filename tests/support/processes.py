"""Real processes of the command line, and swarms of them on loopback: started, heard, surely gone.

They are forks of a process that has imported what they need (``forked.py``), in sessions of their own:
a terminal's Ctrl-C is for pytest, which ends the others.

Rules of this file: every wait has a deadline, and what a process said on standard error is part of
the message when one passes. A node's standard input is a pipe that only this process holds
(``--exit-with-stdin``), so that it goes even if this one is killed.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio
from chaos_parts.proxy import HOST, Proxy
from petals.node.config import NodeConfig
from petals.node.node import Node
from petals.protocol.errors import PeerError
from support.forked import ForkedProcess

COMMAND = (sys.executable, "-P", "-m", "petals.node")
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
DEADLINE = 120.0
"""Seconds for anything that a process does: far more than it takes, also on a busy machine."""
LEAVE_DEADLINE = 10.0
"""A node is gone within 5 s of being told to leave; twice that where others use the machine."""

_LOAD = ("sessions", "engine_sessions", "cache_tokens_used", "steps_queued")
_TAIL = 3000


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child: ours, without what a developer may have set for the program."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("PETALS_")
    } | {"PETALS_CONFIG": os.devnull}
    return {**inherited, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", **changes}


class CommandProcess:
    """A running command. Use it as a context manager: leaving it kills what still runs."""

    def __init__(self, *arguments: str, network: str | None = None, haste: float = 1.0) -> None:
        """``network``: the network namespace to run in; ``haste``: how fast clocks go."""
        self.arguments = arguments
        inside = {"PETALS_TEST_HASTE": str(haste)}
        if network is not None:
            inside["PETALS_TEST_NETWORK"] = network
        self.lines: list[str] = []
        """What was read of standard output so far."""
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        self.process = ForkedProcess(
            [arguments[0], "--exit-with-stdin", *arguments[1:]], environment(**inside)
        )
        self._readers = [
            threading.Thread(target=self._read_output, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    @property
    def errors(self) -> str:
        """What it has said on standard error."""
        return "".join(self._errors)

    def line(self, timeout: float = DEADLINE) -> str:
        """The next line on standard output."""
        try:
            line = self._queue.get(timeout=timeout)
        except queue.Empty:
            raise self._failure(f"said nothing for {timeout:.0f} s") from None
        if line is None:
            raise self._failure("ended")
        self.lines.append(line)
        return line

    def event(self, name: str, timeout: float = DEADLINE) -> dict[str, Any]:
        """The next event of that name, of those that ``run --json`` reports."""
        until = time.monotonic() + timeout
        while True:
            event: dict[str, Any] = json.loads(self.line(max(0.0, until - time.monotonic())))
            if event["event"] == name:
                return event

    def wait(self, timeout: float = DEADLINE) -> int:
        """The exit code, once it has ended and all of its output was read."""
        try:
            code = self.process.wait(timeout)
        except TimeoutError:
            raise self._failure(f"has not ended after {timeout:.0f} s") from None
        for reader in self._readers:
            reader.join()
        while (line := self._queue.get()) is not None:
            self.lines.append(line)
        self._queue.put(None)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def _read_output(self) -> None:
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def _read_errors(self) -> None:
        for line in self.process.stderr:
            self._errors.append(line)

    def _failure(self, what: str) -> AssertionError:
        return AssertionError(
            f"petals-node {' '.join(self.arguments)}: {what} (exit code {self.process.poll()}); "
            f"its standard error:\n{self.errors[-_TAIL:]}"
        )


def run_command(
    *arguments: str, timeout: float = DEADLINE, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; ``text`` is its standard input."""
    process = ForkedProcess(arguments, environment())
    code, output, errors = process.communicate(text, timeout)
    return subprocess.CompletedProcess(arguments, code, output, errors)


class ServingNode(CommandProcess):
    """A ``petals-node run`` process; ``wait_serving`` before anything else is asked of it."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        listen: str = LOOPBACK,
        network: str | None = None,
        haste: float = 1.0,
    ) -> None:
        command = ("run", "--json", "--listen", listen, "--data-dir", str(folder))
        super().__init__(*command, *options, network=network, haste=haste)
        self.folder = folder
        """Its data directory."""
        self.peer_id = ""
        self.multiaddr = ""
        self.model: str | None = None
        self.blocks: tuple[int, int] | None = None

    def wait_serving(self) -> None:
        """Until it says that it serves."""
        event = self.event("serving")
        self.peer_id, self.multiaddr = event["peer_id"], event["multiaddr"]
        self.model = event["model"]
        self.blocks = None if event["blocks"] is None else tuple(event["blocks"])


class SeedNode(CommandProcess):
    """A ``petals-node seed`` process."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(
            "seed", "--json", "--listen", LOOPBACK, "--data-dir", str(folder), *options
        )
        self.peer_id = ""
        self.multiaddr = ""
        self.fingerprint = ""

    def wait_seeding(self) -> None:
        """Until it says that it gives its model."""
        event = self.event("seeding")
        self.peer_id, self.multiaddr = event["peer_id"], event["multiaddr"]
        self.fingerprint = event["fingerprint"]


class ProcessSwarm:
    """A bootstrap peer without a model, and nodes that serve. Made by ``swarm``."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, haste: float) -> None:
        self._folder = folder
        self._haste = haste
        self._stack = stack
        self.nodes: list[ServingNode] = []
        """Those that serve blocks, in the order in which they were started."""
        self.bootstrap = self._start()
        self.bootstrap.wait_serving()

    def restart_bootstrap(self) -> None:
        """Start the bootstrap peer again, which has ended: it is the same, and knows nothing."""
        listen, _, _ = self.address.partition("/p2p/")
        self.bootstrap = ServingNode(self.bootstrap.folder, listen=listen, haste=self._haste)
        self._stack.enter_context(self.bootstrap)
        self.bootstrap.wait_serving()

    @property
    def address(self) -> str:
        """The bootstrap peer's."""
        return self.bootstrap.multiaddr

    def serve(
        self, model: str | Path, *spans: str, options: Sequence[str] = ()
    ) -> list[ServingNode]:
        """Start a node for each span, all at once, and wait until they serve."""
        joining = ("--model", str(model), "--bootstrap", self.address, *options)
        return self._serving([self._start(*joining, "--blocks", span) for span in spans])

    def start(self, model: str | Path, *options: str, folder: Path | None = None) -> ServingNode:
        """Start a node, and don't wait for it; ``folder``: with the data of one that is gone."""
        joining = ("--model", str(model), "--bootstrap", self.address)
        return self._start(*joining, *options, folder=folder)

    def seed(self, model: str | Path, *options: str) -> "SeedNode":
        """Start a ``petals-node seed``, and wait until it gives the model."""
        node = SeedNode(
            self._new_folder(), "--model", str(model), "--bootstrap", self.address, *options
        )
        self._stack.enter_context(node)
        node.wait_seeding()
        return node

    def serve_named(
        self, spans: Mapping[str, str], model: str | Path, *, options: Sequence[str] = ()
    ) -> list[ServingNode]:
        """Start a node for each span under a public name, all at once, and wait until they serve."""
        joining = ("--model", str(model), "--bootstrap", self.address, *options)
        return self._serving(
            [
                self._start(*joining, "--blocks", span, "--public-name", name)
                for name, span in spans.items()
            ]
        )

    def serve_some(self, model: str | Path, *options: str) -> ServingNode:
        """Start a node that chooses its blocks, and wait until it serves."""
        joining = ("--model", str(model), "--bootstrap", self.address)
        return self._serving([self._start(*joining, *options)])[0]

    def serve_behind(self, proxies: Mapping[str, Proxy], model: str | Path) -> list[ServingNode]:
        """Start a node behind each proxy, by the span that it is to serve."""
        return self._serving(
            [
                self._start(
                    *("--model", str(model), "--bootstrap", self.address, "--blocks", span),
                    *("--announce", f"/ip4/{HOST}/tcp/{proxy.port}"),
                    listen=f"/ip4/{HOST}/tcp/{proxy.target}",
                )
                for span, proxy in proxies.items()
            ]
        )

    def _serving(self, nodes: list[ServingNode]) -> list[ServingNode]:
        for node in nodes:
            node.wait_serving()
        self.nodes += nodes
        return nodes

    def node(self, peer_id: str) -> ServingNode:
        """The process behind a peer id."""
        return next(node for node in self.nodes if node.peer_id == peer_id)

    def generate(self, model: str | Path, prompt: str, *options: str) -> CommandProcess:
        """Start a ``petals-node generate --json`` in this swarm; killed with it."""
        process = CommandProcess(
            "generate", "--json", "--model", str(model), "--bootstrap", self.address, *options,
            "--", prompt,
        )  # fmt: skip
        return self._stack.enter_context(process)

    def _new_folder(self) -> Path:
        folder = self._folder / str(len(list(self._folder.iterdir())))
        folder.mkdir()
        return folder

    def _start(
        self, *options: str, listen: str = LOOPBACK, folder: Path | None = None
    ) -> ServingNode:
        node = ServingNode(folder or self._new_folder(), *options, listen=listen, haste=self._haste)
        self._stack.enter_context(node)
        return node


@contextlib.contextmanager
def swarm(folder: Path, *, haste: float = 1.0) -> Iterator[ProcessSwarm]:
    """A swarm that is gone afterwards. ``folder`` is empty and holds the nodes' data."""
    with contextlib.ExitStack() as stack:
        yield ProcessSwarm(folder, stack, haste)


Figures = Mapping[str, float]


async def figures_of(asker: Node, node: ServingNode) -> Figures:
    """A node's own statistics, asked of itself over its describe protocol."""
    _, figures = await asker.describe(node.peer_id, [node.multiaddr])
    return figures


async def figures_until(
    asker: Node,
    node: ServingNode,
    condition: Callable[[Figures], bool],
    *,
    timeout: float = DEADLINE,
) -> Figures:
    """Ask again and again until the figures are as wanted."""
    figures: Figures = {}
    with trio.move_on_after(timeout):
        while True:
            with contextlib.suppress(PeerError):  # it may be busy, or not know our address yet
                figures = await figures_of(asker, node)
                if condition(figures):
                    return figures
            await trio.sleep(0.1)
    raise AssertionError(f"node {node.blocks} has {dict(figures)}; {node.errors[-_TAIL:]}")


def idle(figures: Figures) -> bool:
    """Whether a node holds nothing for any session."""
    return all(figures[name] == 0 for name in _LOAD)


def nothing_left(figures: Figures, before: Figures) -> bool:
    """Whether a node has neither a session nor a task or a stream that may belong to one."""
    return idle(figures) and all(figures[name] <= before[name] for name in ("tasks", "streams"))


@contextlib.asynccontextmanager
async def originating(
    processes: ProcessSwarm,
    model: str | Path,
    *,
    patience: float = 10.0,
    wire_dtype: str = "auto",
) -> AsyncIterator[Node]:
    """A node in this process that originates in the swarm; with a deadline for all that it does."""
    config = NodeConfig(
        model=str(model),
        serve=False,
        bootstrap=(processes.address,),
        dtype="float32",
        wire_dtype=wire_dtype,
        patience=patience,
    )
    with trio.fail_after(2 * DEADLINE):
        async with Node(config) as node:
            yield node
