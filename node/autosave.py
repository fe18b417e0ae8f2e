"""Keep a file up to date with a session that runs, so that a crash loses a second of it at most."""

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ..protocol.errors import ConfigError
from . import saved_session
from .wakeup import open_flat_nursery

if TYPE_CHECKING:
    from .originate import Session

logger = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two writes: what is lost is generated again in less than it took, and the disk is
left in peace."""


@contextlib.asynccontextmanager
async def keep_saved(session: "Session", path: Path | None) -> AsyncIterator[None]:
    """Save the session in the file while the block runs, and at its end, however it ends.

    A disk that fails does not end the session: that is logged, and tried again. No path: do nothing.
    """
    if path is None:
        yield
        return
    autosave = _Autosave(session, path)
    async with open_flat_nursery() as nursery:
        nursery.start_soon(autosave.run)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await autosave.save()


class _Autosave:
    def __init__(self, session: "Session", path: Path) -> None:
        self._session = session
        self._path = path
        self._lock = trio.Lock()
        self._saved: saved_session.SavedSession | None = None
        self._failed = False

    async def run(self) -> None:
        while True:
            while self._session.saved() == self._saved:
                await self._session.changed.wait()
            await self.save()
            await trio.sleep(INTERVAL)

    async def save(self) -> None:
        async with self._lock:  # a write that was begun ends before another, also when cancelled
            now = self._session.saved()
            if now == self._saved:
                return
            try:
                await trio.to_thread.run_sync(saved_session.save, self._path, now)
            except ConfigError as error:
                if not self._failed:
                    logger.warning("%s", error)
                self._failed = True
            else:
                self._saved, self._failed = now, False
