"""The bridges over trio: one failure stays one exception, a future is waited for."""

from concurrent.futures import Future

import pytest
import trio
import trio.testing
from petals.node.wakeup import open_flat_nursery, wait_future, when_done
from petals.protocol.errors import NoRoute, PeerError


async def test_failures_of_ours_together_are_the_first_alone() -> None:
    async def fail(error: Exception) -> None:
        raise error

    with pytest.raises((PeerError, NoRoute)):  # noqa: PT012
        async with open_flat_nursery() as nursery:
            nursery.start_soon(fail, PeerError("broken"))
            nursery.start_soon(fail, NoRoute("gone"))


async def test_what_the_block_raises_comes_out_as_it_is() -> None:
    with pytest.raises(ValueError, match="the user's"):
        async with open_flat_nursery():
            raise ValueError("the user's")


async def test_a_failure_beside_a_cancellation_is_that_failure() -> None:
    async def fail_late() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise PeerError("the peer has hung up")

    with trio.CancelScope() as scope:
        with pytest.raises(PeerError, match="hung up"):  # noqa: PT012
            async with open_flat_nursery() as nursery:
                nursery.start_soon(fail_late)
                nursery.start_soon(trio.sleep_forever)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        pytest.fail("the cancellation was lost")
    assert scope.cancelled_caught


async def test_failures_of_others_stay_a_group() -> None:
    async def fail(error: Exception) -> None:
        raise error

    with pytest.raises(ExceptionGroup):  # noqa: PT012
        async with open_flat_nursery() as nursery:
            nursery.start_soon(fail, ValueError("a"))
            nursery.start_soon(fail, KeyError("b"))


async def test_waiting_for_a_future_that_is_cancelled_cancels_it() -> None:
    future: Future[int] = Future()
    with trio.move_on_after(0):
        await wait_future(future)
    assert future.cancelled()
    done: Future[int] = Future()
    done.set_result(7)
    assert await wait_future(done) == 7


async def test_what_another_thread_completes_is_told_in_trios_thread() -> None:
    future: Future[int] = Future()
    told = trio.Event()
    when_done(future, told.set)
    await trio.to_thread.run_sync(future.set_result, 7)
    with trio.fail_after(5):
        await told.wait()


async def test_nobody_is_told_when_trio_has_ended() -> None:
    future: Future[int] = Future()

    async def main() -> None:
        when_done(future, lambda: pytest.fail("nobody is there"))

    await trio.to_thread.run_sync(trio.run, main)
    future.set_result(7)
