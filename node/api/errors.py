"""What a client is told when something cannot be: OpenAI's codes, in OpenAI's shape.

Rules of this file: it is the border between our errors and HTTP. Whatever a client gets says what was
wrong and what to do; 5xx with ``retry-after`` means that the same request may work later.
"""

import math
from typing import Any

from starlette.responses import JSONResponse

from ...protocol.errors import CacheFull, ConfigError, ModelError, PetalsError

RETRY_AFTER = 5
"""Seconds, where nothing says when it will be better: a node restarts in about as long."""


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def of_petals(error: PetalsError) -> ApiError:
    """Ours, as a client of the API should see it."""
    if isinstance(error, ConfigError):
        return ApiError(400, str(error))
    if isinstance(error, ModelError):
        return ApiError(500, str(error), kind="server_error", code="model_error")
    retry_after: float | None = RETRY_AFTER
    if isinstance(error, CacheFull):
        retry_after = error.retry_after
    return ApiError(  # nobody serves some blocks, peers refuse, or the swarm has gone
        503,
        str(error),
        kind="server_error",
        code="no_route",
        retry_after=None if retry_after is None else max(1, math.ceil(retry_after)),
    )
