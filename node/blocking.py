"""The same node from a program without trio: ``petals.connect()``.

A thread of its own runs trio and the node; every call here crosses over to it and waits.
"""

import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

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
from .node import Node
from .originate import Generation, GenerationStatus
from .originate import GenerationHandle as TrioHandle

T = TypeVar("T")


class GenerationHandle:
    """A generation that runs while the program does something else."""

    def __init__(self, client: "Client", handle: TrioHandle) -> None:
        self._client = client
        self._handle = handle

    def status(self) -> GenerationStatus:
        """How far it is: state, tokens so far, tokens/s, route."""
        return self._client._call_sync(self._handle.status)

    def result(self, timeout: float | None = None) -> Generation:
        """What came out (of the first prompt), when it has ended. Raises what made it fail.

        ``timeout`` is in seconds; TimeoutError when it passes (the generation goes on).
        """
        return self.results(timeout)[0]

    def results(self, timeout: float | None = None) -> list[Generation]:
        """What came out of every prompt. As ``result``."""

        async def wait() -> list[Generation]:
            with trio.fail_after(float("inf") if timeout is None else timeout):
                return await self._handle.results()

        try:
            return self._client._call(wait)
        except trio.TooSlowError:
            raise TimeoutError(f"the generation has not ended after {timeout} s") from None

    def partial(self) -> Generation:
        """What there is so far."""
        return self._client._call_sync(self._handle.partial)[0]

    def save(self, path: Path | str) -> None:
        """Put what there is so far into a file that ``Client.resume`` goes on from.

        It may be running, or have ended in whatever way. Raises ConfigError.
        """
        self._client._call(partial(self._handle.save, path))

    def cancel(self) -> None:
        """Stop it; ``result`` raises PetalsError then, ``partial`` keeps the text."""
        self._client._call_sync(self._handle.cancel)

    def __iter__(self) -> Iterator[str]:
        """The text as it comes."""
        pieces = self._handle.__aiter__()
        while True:
            try:
                yield self._client._call(pieces.__anext__)
            except StopAsyncIteration:
                return


class Client:
    """A node in a thread, for originating. Made by ``connect``.

    Use it as a context manager, or call ``disconnect`` at the end.
    """

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._node: Node | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop: trio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="petals-client", daemon=True)
        self._thread.start()
        self._ready.wait()
        self._raise_failure()

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
    ) -> Iterator[str]:
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

        async def submit() -> TrioHandle:
            return await self._running_node().submit(
                prompt, params, max_length=max_length, save_to=save_to
            )

        return GenerationHandle(self, self._call(submit))

    def resume(self, path: Path | str, *, save_to: Path | str | None = None) -> GenerationHandle:
        """Start generating the rest of a text that was saved; the text is the whole one.

        ``save_to`` as in ``submit``; it may be ``path``. Raises ConfigError.
        """

        async def resume() -> TrioHandle:
            return await self._running_node().resume(path, save_to=save_to)

        return GenerationHandle(self, self._call(resume))

    def swarm_view(self, model_name: str | None = None) -> list[Announcement]:
        """Who serves what, as of now: of the models of that name, or of every model."""
        return self._call(lambda: self._running_node().swarm_view(model_name))

    def disconnect(self) -> None:
        """Leave the swarm and end the thread. Idempotent."""
        if self._thread.is_alive() and self._token is not None and self._stop is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._stop.set)
            self._thread.join()

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

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            self._failure = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        async with Node(self._config) as self._node:
            self._ready.set()
            await self._stop.wait()

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        try:
            return trio.from_thread.run(function, trio_token=self._token)
        except trio.RunFinishedError:
            raise PetalsError("the client is disconnected") from None

    def _call_sync(self, function: Callable[[], T]) -> T:
        try:
            return trio.from_thread.run_sync(function, trio_token=self._token)
        except trio.RunFinishedError:
            raise PetalsError("the client is disconnected") from None

    def _running_node(self) -> Node:
        assert self._node is not None
        return self._node


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
