"""The HTTP API of a node: its endpoints, and what stands in front of them."""

import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...protocol.errors import PeerError
from ..node import Node, wall_clock
from . import metrics
from .config import ApiConfig
from .errors import ApiError, of_petals
from .generating import Generating, check_model
from .guard import Guard
from .metrics import Metrics
from .page_files import page_routes
from .requests import ChatRequest, CompletionRequest
from .shapes import JSON, ChatShape, CompletionShape
from .swarm_events import SwarmEvents
from .watch import Watch


def make_app(node: Node, config: ApiConfig, watch: Watch) -> Starlette:
    """The ASGI application for a node that runs, and whose model is loaded."""
    counted = Metrics(node)
    started = int(wall_clock())

    def model() -> JSON:
        return {
            "id": node.model_name,
            "object": "model",
            "created": started,
            "owned_by": "petals-node",
        }

    async def models(request: Request) -> Response:
        del request
        return JSONResponse({"object": "list", "data": [model()]})

    async def one_model(request: Request) -> Response:
        check_model(node, request.path_params["name"])
        return JSONResponse(model())

    async def health(request: Request) -> Response:
        del request
        return JSONResponse({"status": "ok"})

    async def figures(request: Request) -> Response:
        del request
        return Response(counted.text(), headers={"content-type": metrics.CONTENT_TYPE})

    async def swarm(request: Request) -> Response:
        del request
        try:
            return JSONResponse(await watch.models())
        except PeerError as error:
            raise of_petals(error) from error

    encoding = trio.CapacityLimiter(1)
    completions = Generating(
        node,
        counted,
        CompletionRequest,
        CompletionShape(),
        max_body=config.max_body,
        encoding=encoding,
    )
    chat = Generating(
        node, counted, ChatRequest, ChatShape(), max_body=config.max_body, encoding=encoding
    )
    asking = [
        Middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    ]
    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/health", health),
            Route("/metrics", figures),
            Route("/swarm", swarm),
            Route("/swarm/events", SwarmEvents(watch), methods=["GET"]),
            *page_routes(),
        ],
        middleware=[
            *(asking if config.cors_origins else []),
            Middleware(Guard, config=config, metrics=counted),
        ],
        exception_handlers={
            ApiError: _tell_api_error,
            HTTPException: _tell_http_error,
            Exception: _tell_bug,
        },
    )


def _tell_api_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError)
    return error.response()


def _tell_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, what).response()


def _tell_bug(request: Request, error: Exception) -> Response:
    del request, error  # the log has it
    return ApiError(
        500, "this should not happen; the node's log says more", kind="server_error"
    ).response()
