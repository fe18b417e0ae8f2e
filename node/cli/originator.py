"""What the originating commands (generate, chat, status) have in common.

Configuration, saved sessions and what contradicts them, the figures, and what is said of a session that
waits.
"""

import contextlib
import dataclasses
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from ...inference.sampling_params import SamplingParams
from ...protocol.errors import ConfigError
from .. import saved_session
from ..config import DEFAULT_PATIENCE, NodeConfig
from ..saved_session import SavedSession
from ..wakeup import open_flat_nursery
from . import arguments
from .progress import shown

if TYPE_CHECKING:
    from ..generation import Generation
    from ..node import Node

TELL_AFTER = 2.0
"""Seconds that a session waits before anybody is told: most gaps are filled by then."""
LOOK_INTERVAL = 0.5


@contextlib.asynccontextmanager
async def joined(config: NodeConfig) -> AsyncIterator[tuple["Node", Callable[[], None]]]:
    """A node, with bars for what it downloads or fetches, and what ends these.

    It has to be called before anything else is written.
    """
    from ..node import Node

    with contextlib.ExitStack() as bars:
        async with Node(config, bars.enter_context(shown())) as node:
            yield node, bars.close


def node_config(
    *,
    model: str | None,
    bootstrap: Sequence[str] | None,
    mdns: bool | None = None,
    swarm_key: Path | None = None,
    allow_peers: Path | None = None,
    dtype: str = "auto",
    wire_dtype: str = "auto",
    device: str = "auto",
    patience: float | None = None,
) -> NodeConfig:
    """The configuration of a node that serves no blocks, and keeps nothing but weights from peers."""
    return NodeConfig(
        model=model,
        serve=False,
        bootstrap=(arguments.bootstrap_peers if mdns else arguments.some_bootstrap_peers)(
            bootstrap
        ),
        mdns=mdns,
        swarm_key=swarm_key,
        allow_peers=allow_peers,
        dtype=dtype,
        wire_dtype=wire_dtype,
        device=device,
        patience=DEFAULT_PATIENCE if patience is None else patience,
    )


# --- saved sessions -------------------------------------------------------------------------------


def load_if_there(file: Path | None) -> SavedSession | None:
    """The session in ``--resume FILE``; None if there is no such file yet."""
    if file is None or not file.exists():
        return None
    saved = saved_session.load(file)
    if len(saved.token_ids) > 1:
        raise ConfigError(
            f"--resume: {file} holds {len(saved.token_ids)} texts, which only a program can go on "
            "with (Client.resume, Node.resume)"
        )
    return saved


def chosen_model(given: str | None, saved: SavedSession | None) -> str:
    """The model to open. One that is given is compared with the saved session's by its content."""
    return given or ("demo" if saved is None else saved.model)


def chosen_wire_dtype(given: str, saved: SavedSession | None) -> str:
    """``--wire-dtype``, which a saved session has already."""
    if saved is None or given in ("auto", saved.wire_dtype):
        return given
    raise _contradiction("wire_dtype", given, saved.wire_dtype.value)


def params_of_one_text(saved: SavedSession | None, **given: Any) -> SamplingParams:
    """How to sample; what is given must not differ from what a saved text was begun with."""
    chosen = _given(given)
    if saved is None or saved.writing is None:
        return SamplingParams(**chosen)
    for name, value in chosen.items():
        before = getattr(saved.writing.params, name)
        if value != before:
            raise _contradiction(name, value, before)
    return saved.writing.params


def params_of_next_turns(saved: SavedSession | None, **given: Any) -> SamplingParams:
    """How to sample from now on: as is given, else as in the turn before."""
    if saved is None or saved.writing is None:
        return SamplingParams(**_given(given))
    return dataclasses.replace(saved.writing.params, **_given(given))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    chosen = {name: value for name, value in options.items() if value is not None}
    if "stop" in chosen:
        chosen["stop"] = tuple(chosen["stop"])
    return chosen


def _contradiction(name: str, value: object, before: object) -> ConfigError:
    return ConfigError(
        f"--{name.replace('_', '-')}: {value} contradicts the text to resume, which was begun with "
        f"{before}; leave the option out, or begin anew with another file"
    )


# --- waiting --------------------------------------------------------------------------------------


class WaitTeller:
    """Says when a session begins to wait for longer than a moment, and when it goes on."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: float | None = None
        self._told = False

    def look(self, reason: str | None, now: float) -> str | None:
        """What is to be said, if anything, where ``reason`` is why the session waits at ``now``."""
        if self._since is None:
            self._since = now if reason is not None else None
            return None
        waited = now - self._since
        if reason is None:
            told, self._since, self._told = self._told, None, False
            return f"Going on, after {waited:.0f} s." if told else None
        if self._told or waited < TELL_AFTER:
            return None
        self._told = True
        return f"Waiting, for {self._patience:g} s at most: {reason}"


@contextlib.asynccontextmanager
async def telling_waits(
    waiting_for: Callable[[], str | None], patience: float
) -> AsyncIterator[None]:
    """Say on standard error when what runs in the block has to wait."""

    async def watch() -> None:
        teller = WaitTeller(patience)
        while True:
            line = teller.look(waiting_for(), trio.current_time())
            if line is not None:
                note(line)
            await trio.sleep(LOOK_INTERVAL)

    async with open_flat_nursery() as nursery:
        nursery.start_soon(watch)
        yield
        nursery.cancel_scope.cancel()


def note(line: str) -> None:
    """Tell a person something that is no text of the model's."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


# --- figures --------------------------------------------------------------------------------------


def figures(generation: "Generation") -> str:
    """One line about how a generation went, for people."""
    parts = [
        f"{len(generation.token_ids)} tokens",
        f"{generation.tokens_per_second:.1f} tokens/s",
        f"first after {generation.time_to_first_token:.2f} s",
        "route " + route_text(generation.route),
    ]
    if generation.recoveries:
        parts.append(f"{generation.recoveries} recoveries")
    return ", ".join(parts)


def route_text(route: Sequence[Any]) -> str:
    """A route for people: who computes which blocks, in order."""
    return " → ".join(f"{short_peer_id(hop.peer_id)} ({hop.span})" for hop in route)


def short_peer_id(peer_id: str) -> str:
    """The end of a peer id, which is where peer ids differ."""
    return f"…{peer_id[-8:]}"


def result_record(generation: "Generation") -> dict[str, Any]:
    """The JSON object that ``generate --json`` ends with."""
    return {
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "tokens_per_second": generation.tokens_per_second,
        "time_to_first_token": generation.time_to_first_token,
        "route": [
            {"peer_id": hop.peer_id, "blocks": [hop.span.start, hop.span.end]}
            for hop in generation.route
        ],
        "recoveries": generation.recoveries,
    }
