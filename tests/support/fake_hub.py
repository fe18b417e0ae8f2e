"""A Hugging Face hub on loopback that speaks as much of its protocol as we use."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves ``folder`` as the repository ``someone/tiny``, and remembers what was asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.downloads: list[str] = []
        self.refusal: tuple[int, str] | None = None
        """Status and error code to answer everything with."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        content = self._answer()
        if content:
            self.server.downloads.append(self.path.rsplit("/", 1)[1])
            self.wfile.write(content)

    def _answer(self) -> bytes:
        repository, _, filename = self.path.removeprefix("/").partition("/resolve/main/")
        path = self.server.folder / filename
        if self.server.refusal is not None:
            self._headers(*self.server.refusal)
        elif self.path.startswith("/api/models/someone/tiny/tree/main/"):
            self._headers(404, "EntryNotFound")  # it has no folders
        elif repository != "someone/tiny":
            self._headers(404, "RepoNotFound")
        elif not filename or not path.is_file():
            self._headers(404, "EntryNotFound")
        else:
            content = path.read_bytes()
            self._headers(200, None, content)
            return content
        return b""

    def _headers(self, status: int, error: str | None, content: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What setting HF_ENDPOINT does before huggingface_hub is imported."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextmanager
def fake_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub with ``folder`` as its one model; this process believes that it is the real one."""
    server = FakeHub(folder)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_to(server.url, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
