"""The web page: files that ship with the package, read once and served as they are.

Rules of this file: nothing is built, nothing comes from another host, and the browser is told to hold the
page to that. The files hold no secret: what they show is asked for with the key.
"""

import hashlib
from collections.abc import Iterator
from importlib import resources
from pathlib import PurePath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = "page"
INDEX = "index.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self'; script-src 'self'; style-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "cache-control": "no-cache",  # asked again, and answered with 304: an update is seen at once
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_routes() -> Iterator[Route]:
    """A route for each file; that of the page itself is ``/``."""
    for file in (resources.files(__package__ or "") / FOLDER).iterdir():
        path = "/" if file.name == INDEX else f"/{FOLDER}/{file.name}"
        shipped = _File(file.read_bytes(), _TYPES[PurePath(file.name).suffix])
        yield Route(path, shipped.answer)


def is_page(path: str) -> bool:
    """Whether a path is one of the page's files, and not what they ask for."""
    return path == "/" or path.startswith(f"/{FOLDER}/")


class _File:
    def __init__(self, content: bytes, content_type: str) -> None:
        self._content = content
        tag = hashlib.sha256(content).hexdigest()[:20]
        self._headers = {**HEADERS, "content-type": content_type, "etag": f'"{tag}"'}

    async def answer(self, request: Request) -> Response:
        """The file, or that it has not changed."""
        if request.headers.get("if-none-match") == self._headers["etag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)
