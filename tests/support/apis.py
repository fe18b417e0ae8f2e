"""A swarm with HTTP APIs, as the ``openai`` client and others find it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import trio
from openai import OpenAI
from support.processes import CommandProcess, ProcessSwarm, swarm
from support.reference import ReferenceModel

T = TypeVar("T")

KEY = "a secret"
PAGE = "https://page.example"
MOST_REQUESTS = 6
PROMPT = "In the beginning God created the heaven and the earth."
MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who created the heaven?"},
]
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 600, "temperature": 1}
"""A text that takes far longer than what a test does meanwhile."""


@dataclass(frozen=True)
class Served:
    """A swarm and its two APIs: of a node that serves blocks, and of one that only originates."""

    processes: ProcessSwarm
    model: ReferenceModel
    api: CommandProcess
    """The one that only originates."""
    open_url: str
    """Of the last of the nodes that serve blocks; it needs no key."""
    url: str
    """Of the other one, which needs one, and has limits."""
    clients: contextlib.ExitStack
    """Closes them."""

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.model.folder.name

    def client(self, **options: Any) -> OpenAI:
        """With the key, and without trying again what fails."""
        client = OpenAI(**{"base_url": self.url, "api_key": KEY, "max_retries": 0, **options})
        return self.clients.enter_context(client)


def start_api(processes: ProcessSwarm, model: ReferenceModel, *options: str) -> CommandProcess:
    """Of a node that only originates."""
    return CommandProcess(
        *("api", "--json", "--model", model.name, "--bootstrap", processes.address),
        *("--api", "127.0.0.1:0", "--dtype", "float32", *options),
    )


@contextlib.contextmanager
def serving_apis(model: ReferenceModel, folder: Path, *spans: str) -> Iterator[Served]:
    """A node for each span, all with an API, and one more API."""
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(swarm(folder))
        options = ("--api-key", KEY, "--api-requests", str(MOST_REQUESTS), "--api-body", "1")
        api = stack.enter_context(start_api(processes, model, *options, "--cors-origin", PAGE))
        nodes = processes.serve(model.folder, *spans, options=("--api", "127.0.0.1:0"))
        yield Served(
            processes,
            model,
            api,
            str(nodes[-1].event("api")["url"]),
            str(api.event("api")["url"]),
            stack.enter_context(contextlib.ExitStack()),
        )


async def in_thread(function: Callable[[], T]) -> T:
    """The ``openai`` client blocks."""
    return await trio.to_thread.run_sync(function)


def raw(url: str, **options: Any) -> httpx.Response:
    """A request as anybody can make one."""
    return httpx.request(**{"method": "POST", "url": url, "timeout": 30, **options})
