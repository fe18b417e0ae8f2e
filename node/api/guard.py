"""Who may ask, and how much at once: in front of every endpoint, before anything is read.

Rules of this file: a web page in somebody's browser is not that person. It can reach a loopback address
under a name of its own, and send what needs no asking first; so without a key only loopback's own names
are answered, and only JSON is taken.
"""

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import ApiConfig, is_loopback
from .errors import ApiError
from .metrics import Metrics
from .page_files import is_page

HEALTH = "/health"
COUNTED_PATHS = frozenset(
    {
        "/",
        HEALTH,
        "/metrics",
        "/swarm",
        "/swarm/events",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
    }
)
"""Each is a series of its own in the metrics; others, which anybody can make up, are one together."""
BUSY_RETRY_AFTER = 1


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, config: ApiConfig, metrics: Metrics) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # nginx's: nobody was there any more to be answered

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        counted = scope["method"] == "POST"
        self._running += counted
        try:
            self._check(scope)
            with self._metrics.running.track_inprogress():
                await self._app(scope, receive, noting)
        except ApiError as error:
            await error.response()(scope, receive, noting)
        finally:
            self._running -= counted
            path = scope["path"] if scope["path"] in COUNTED_PATHS else "other"
            self._metrics.requests.labels(path, str(status)).inc()

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        key = self._config.key
        if key is None:
            self._check_host(headers.get("host", ""))
        elif not _is_open(scope["path"]):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(given.strip().encode(), key.encode())
            if scheme.lower() != "bearer" or not known:
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                )
        if scope["method"] != "POST":
            return
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(400, "the body must be JSON; send `Content-Type: application/json`")
        if self._running > self._config.max_requests:
            raise ApiError(
                503,
                f"{self._config.max_requests} requests are in work already; ask again in a moment",
                kind="server_error",
                code="overloaded",
                retry_after=BUSY_RETRY_AFTER,
            )

    def _check_host(self, host: str) -> None:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if not is_loopback(name):
            raise ApiError(
                403, f"{host!r} is no name of this machine's own loopback; use 127.0.0.1"
            )


def _is_open(path: str) -> bool:
    """Answered without a key: who watches a service need not be able to use it; the page asks for it."""
    return path == HEALTH or is_page(path)
