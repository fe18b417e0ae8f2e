"""Serve the API: Hypercorn's trio worker behind a socket, a task per connection.

Rules of this file: whatever happens on one connection ends that connection and nothing else, and when the
API is cancelled its connections are closed at once, whether or not their clients read.

Hypercorn's ``serve`` gives neither: an exception out of one connection ends them all, and it shields what
it sends from being cancelled. So its worker for one connection is used, which is no public name of it:
that is why its version is pinned.
"""

import logging
import socket
from typing import Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from ..node import Node
from .app import make_app
from .config import ApiConfig
from .watch import Watch

logger = logging.getLogger(__name__)


async def serve(
    node: Node,
    config: ApiConfig,
    listening: socket.socket,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests on ``listening`` until cancelled. Raises ModelError.

    Started once the model's ends are loaded.
    """
    await node.originator()
    watch = Watch(node)
    app = ASGIWrapper(make_app(node, config, watch))  # type: ignore[arg-type]
    worker = _worker_config()
    context = WorkerContext(None)

    async def handle(stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_close_when_cancelled, stream)
            try:
                await TCPServer(app, worker, context, ConnectionState({}), stream)  # type: ignore[arg-type]
            except Exception:
                logger.exception("a connection of the API failed")
            nursery.cancel_scope.cancel()

    listening.setblocking(False)
    async with (
        trio.SocketListener(trio.socket.from_stdlib_socket(listening)) as listener,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(watch.run)
        task_status.started()
        await trio.serve_listeners(handle, [listener])


async def _close_when_cancelled(stream: trio.SocketStream) -> None:
    try:
        await trio.sleep_forever()
    finally:
        stream.socket.close()


def _worker_config() -> Any:
    config = Config()
    config.accesslog = None
    config.errorlog = logger
    config.include_server_header = False
    return config
