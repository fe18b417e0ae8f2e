"""The same node from a program without trio: ``petals.connect()``.

A thread of its own runs trio and the node (``node_thread.py``); every call here crosses over to it and
waits.
"""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import trio

from ..inference.sampling_params import SamplingParams
from ..protocol.announcement import Announcement
from ..protocol.errors import ConfigError, PetalsError
from .config import (
    BOOTSTRAP_VARIABLE,
    DEFAULT_PATIENCE,
    NodeConfig,
    bootstrap_from_environment,
    default_data_dir,
)
from .generation import Generation, GenerationStatus
from .generation import GenerationHandle as TrioHandle
from .node import Node
from .node_thread import NodeThread


class GenerationHandle:
    """A generation that runs while the program does something else."""

    def __init__(self, thread: NodeThread, handle: TrioHandle) -> None:
        self._thread = thread
        self._handle = handle

    def status(self) -> GenerationStatus:
        """How far it is: state, tokens so far, tokens/s, route."""
        return self._thread.call_sync(self._handle.status)

    def result(self, timeout: float | None = None) -> Generation:
        """What came out (of the first prompt), when it has ended. Raises what made it fail.

        ``timeout`` is in seconds; TimeoutError when it passes (the generation goes on).
        """
        return self.results(timeout)[0]

    def results(self, timeout: float | None = None) -> list[Generation]:
        """What came out of every prompt. As ``result``."""

        async def wait(_: Node) -> list[Generation]:
            with trio.fail_after(float("inf") if timeout is None else timeout):
                return await self._handle.results()

        try:
            return self._thread.call(wait)
        except trio.TooSlowError:
            raise TimeoutError(f"the generation has not ended after {timeout} s") from None

    def partial(self) -> Generation:
        """What there is so far."""
        return self._thread.call_sync(self._handle.partial)[0]

    def save(self, path: Path | str) -> None:
        """Put what there is so far into a file that ``Client.resume`` goes on from.

        It may be running, or have ended in whatever way. Raises ConfigError.
        """
        self._thread.call(lambda _: self._handle.save(path))

    def cancel(self) -> None:
        """Stop it; ``result`` raises PetalsError then, ``partial`` keeps the text."""
        self._thread.call_sync(self._handle.cancel)

    def __iter__(self) -> Iterator[str]:
        """The text as it comes."""
        pieces = self._handle.__aiter__()
        while True:
            try:
                yield self._thread.call(lambda _: pieces.__anext__())
            except StopAsyncIteration:
                return


class Client:
    """A node in a thread, for originating. Made by ``connect``.

    Use it as a context manager, or call ``disconnect`` at the end.
    """

    def __init__(self, config: NodeConfig) -> None:
        self._thread = NodeThread(config)

    def generate(
        self,
        prompt: str,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        **sampling: Any,
    ) -> str:
        """The text that follows ``prompt`` (without the prompt).

        ``max_length`` bounds prompt and new tokens together, ``max_new_tokens`` the new ones alone
        (default 128). ``sampling``: temperature, top_p, top_k, repetition_penalty, seed, stop, as
        in ``SamplingParams``. Raises ConfigError, NoRoute, ModelMismatch, PeerError.
        """
        return (
            self.submit(prompt, max_length=max_length, max_new_tokens=max_new_tokens, **sampling)
            .result()
            .text
        )

    def stream(
        self,
        prompt: str,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """The text of ``generate`` as it comes. Ending the iteration early stops generating."""
        handle = self.submit(
            prompt, max_length=max_length, max_new_tokens=max_new_tokens, **sampling
        )
        try:
            yield from handle
        finally:
            with contextlib.suppress(PetalsError):
                handle.cancel()

    def submit(
        self,
        prompt: str | Sequence[str],
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        save_to: Path | str | None = None,
        **sampling: Any,
    ) -> GenerationHandle:
        """Start generating and return at once. Several prompts run together in one session.

        ``save_to`` is a file for ``resume``: made or replaced now, and kept up to date to the end.
        """
        params = _sampling_params(max_length, max_new_tokens, sampling)

        async def submit(node: Node) -> TrioHandle:
            return await node.submit(prompt, params, max_length=max_length, save_to=save_to)

        return GenerationHandle(self._thread, self._thread.call(submit))

    def resume(self, path: Path | str, *, save_to: Path | str | None = None) -> GenerationHandle:
        """Start generating the rest of a text that was saved; the text is the whole one.

        ``save_to`` as in ``submit``; it may be ``path``. Raises ConfigError.
        """

        async def resume(node: Node) -> TrioHandle:
            return await node.resume(path, save_to=save_to)

        return GenerationHandle(self._thread, self._thread.call(resume))

    def swarm_view(self, model_name: str | None = None) -> list[Announcement]:
        """Who serves what, as of now: of the models of that name, or of every model."""
        return self._thread.call(lambda node: node.swarm_view(model_name))

    def disconnect(self) -> None:
        """Leave the swarm and end the thread. Idempotent."""
        self._thread.stop()

    def __enter__(self) -> "Client":
        """The client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect."""
        self.disconnect()


def connect(
    model: str = "demo",
    initial_peers: Sequence[str] | None = None,
    *,
    dtype: str = "auto",
    wire_dtype: str = "auto",
    device: str = "auto",
    data_dir: Path | str | None = None,
    patience: float = DEFAULT_PATIENCE,
) -> Client:
    """Join a swarm to generate text with ``model`` (``demo``, a folder, or a hub id).

    ``initial_peers`` are multiaddrs of peers to join through; None: those in the environment
    variable ``PETALS_BOOTSTRAP``. ``dtype`` is what this machine computes the model's two ends in,
    ``wire_dtype`` what hidden states travel in, ``patience`` how many seconds a generation waits
    while nobody can serve some blocks (as in ``NodeConfig``). Raises ConfigError when there are no
    peers, PeerError when none can be reached.
    """
    peers = bootstrap_from_environment() if initial_peers is None else tuple(initial_peers)
    if not peers:
        raise ConfigError(
            'no way into a swarm: pass initial_peers=["/ip4/ADDRESS/tcp/PORT/p2p/PEER_ID"], or '
            f"set the environment variable {BOOTSTRAP_VARIABLE}; `petals-node run` starts a swarm "
            "of your own and prints its multiaddr"
        )
    return Client(
        NodeConfig(
            model=model,
            serve=False,
            bootstrap=peers,
            data_dir=default_data_dir() if data_dir is None else Path(data_dir),
            dtype=dtype,
            wire_dtype=wire_dtype,
            device=device,
            patience=patience,
        )
    )


def _sampling_params(
    max_length: int | None, max_new_tokens: int | None, sampling: dict[str, Any]
) -> SamplingParams:
    if max_length is not None and max_new_tokens is not None:
        raise ConfigError("give either max_length or max_new_tokens, not both")
    unknown = set(sampling) - set(SamplingParams.__slots__)
    if unknown:
        raise ConfigError(
            f"unknown sampling parameter {', '.join(sorted(unknown))}; there are "
            f"{', '.join(SamplingParams.__slots__)}"
        )
    if max_new_tokens is not None:
        sampling["max_new_tokens"] = max_new_tokens
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = (sampling["stop"],)
    return SamplingParams(**sampling)
