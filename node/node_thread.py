"""A node in a thread of its own, for programs without trio: what they call crosses over and waits."""

import contextlib
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

import trio

from ..protocol.errors import PetalsError
from .config import NodeConfig
from .node import Node
from .wakeup import open_flat_nursery

T = TypeVar("T")


class Held(Generic[T]):
    """What an asynchronous context gave, and the context kept open. Made by ``NodeThread.hold``."""

    def __init__(self, thread: "NodeThread", value: T) -> None:
        self.value = value
        self._thread = thread
        self._closing = trio.Event()
        self._closed = trio.Event()

    async def until_closed(self) -> None:
        """Return when somebody wants it closed; in trio's thread."""
        await self._closing.wait()

    def has_closed(self) -> None:
        """Tell whoever closes it; in trio's thread."""
        self._closed.set()

    def close(self) -> None:
        """Leave the context, and wait until it has been left. Idempotent."""

        async def close(_: Node) -> None:
            self._closing.set()
            await self._closed.wait()

        with contextlib.suppress(PetalsError):  # the whole thread has ended
            self._thread.call(close)


class NodeThread:
    """Runs a node from now until ``stop``. Raises what keeps the node from running."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._node: Node | None = None
        self._nursery: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop: trio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="petals-client", daemon=True)
        self._thread.start()
        self._ready.wait()
        self._raise_failure()

    def call(self, function: Callable[[Node], Awaitable[T]]) -> T:
        """Await ``function(node)`` in trio's thread. Raises what it raises."""
        node = self._node
        assert node is not None
        try:
            return trio.from_thread.run(lambda: function(node), trio_token=self._token)
        except trio.RunFinishedError:
            raise PetalsError("the client is disconnected") from None

    def call_sync(self, function: Callable[[], T]) -> T:
        """Call ``function`` in trio's thread. Raises what it raises."""
        try:
            return trio.from_thread.run_sync(function, trio_token=self._token)
        except trio.RunFinishedError:
            raise PetalsError("the client is disconnected") from None

    def hold(self, enter: Callable[[Node], AbstractAsyncContextManager[T]]) -> Held[T]:
        """Enter the context, and stay in it until the result is closed. Raises what entering raises."""

        async def keep(node: Node, task_status: trio.TaskStatus[Held[T]]) -> None:
            held: Held[T] | None = None
            try:
                async with enter(node) as value:
                    held = Held(self, value)
                    task_status.started(held)
                    await held.until_closed()
            finally:
                if held is not None:
                    held.has_closed()

        async def start(node: Node) -> Held[T]:
            assert self._nursery is not None
            held: Held[T] = await self._nursery.start(keep, node)
            return held

        return self.call(start)

    def stop(self) -> None:
        """Leave the swarm and end the thread. Idempotent."""
        if self._thread.is_alive() and self._token is not None and self._stop is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._stop.set)
            self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            self._failure = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        async with Node(self._config) as self._node, open_flat_nursery() as self._nursery:
            self._ready.set()
            await self._stop.wait()
            self._nursery.cancel_scope.cancel()
