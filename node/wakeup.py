"""Small bridges over trio.

A wake-up for tasks that share state, a nursery whose one failure stays one exception, and waits for a
worker thread's future.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import trio

from ..protocol.errors import PetalsError

T = TypeVar("T")


class Signal:
    """Wakes everybody who waits. Check the state, then ``wait``, with no await between the two."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def notify(self) -> None:
        """Wake all that wait now."""
        self._event.set()
        self._event = trio.Event()

    async def wait(self) -> None:
        """Return at the next ``notify``."""
        await self._event.wait()


@contextlib.asynccontextmanager
async def open_flat_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery for tasks that fail together: of several failures the first is raised alone.

    When one stream breaks, the tasks that share it all say so; whoever catches a PeerError wants
    one, and whoever runs code in a block of ours wants its own exception back. Several exceptions
    of which some are not ours leave as the group that trio raises.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        # A cancellation that came beside a failure is not lost: trio delivers it again.
        leaves = [leaf for leaf in _leaves(group) if not isinstance(leaf, trio.Cancelled)]
        if len(leaves) != 1 and not (leaves and all(isinstance(e, PetalsError) for e in leaves)):
            raise
        raise leaves[0] from leaves[0].__cause__


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def when_done(future: "Future[T]", callback: Callable[[], None]) -> None:
    """Call ``callback`` in trio's thread once another thread has completed ``future``.

    It must not raise: nobody is there to catch it.
    """
    token = trio.lowlevel.current_trio_token()

    def call(_: "Future[T]") -> None:
        with contextlib.suppress(trio.RunFinishedError):  # nobody is left to be told
            token.run_sync_soon(callback)

    future.add_done_callback(call)


async def wait_future(future: "Future[T]") -> T:
    """The result of ``future``, which another thread completes. Cancelling cancels the future."""
    done = trio.Event()
    when_done(future, done.set)
    try:
        await done.wait()
    except trio.Cancelled:
        future.cancel()
        raise
    return future.result()
