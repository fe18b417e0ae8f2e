"""``petals-node run``, ``seed`` and ``api``: a node that serves until it is told to leave."""

import contextlib
import dataclasses
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from ...inference.progress import Progress, Step
from ...protocol.errors import ConfigError
from ...protocol.span import Span
from ..api.config import ApiConfig
from ..api.listening import listen, page_url, url
from ..config import NodeConfig
from . import arguments, failures, fetched, leaving, seed
from .progress import shown
from .running import running_in

if TYPE_CHECKING:
    from ..node import Node


def node_config(
    *,
    model: str | None,
    blocks: Span | None,
    num_blocks: int | None,
    bootstrap: tuple[str, ...],
    listen: tuple[str, ...],
    announce: tuple[str, ...],
    data_dir: Path | None,
    **settings: Any,
) -> NodeConfig:
    """The configuration of a serving node, or of a bootstrap peer; its data directory is there."""
    if listen:
        settings["listen"] = listen
    if data_dir is not None:
        settings["data_dir"] = data_dir
    config = NodeConfig(
        model=model,
        blocks=blocks,
        num_blocks=num_blocks,
        bootstrap=bootstrap,
        announce=announce,
        **settings,
    )
    arguments.check_data_dir(config.data_dir)
    return config


def serve(
    config: NodeConfig, api: ApiConfig | None = None, *, json_lines: bool, exit_with_stdin: bool
) -> int:
    """Serve blocks, an API, or both, until a signal says to leave."""
    if api is not None and config.model is None:
        raise ConfigError("--api: an API to which model? name it with --model")
    leaving.leave_at_signals_while_starting()
    if exit_with_stdin:
        leaving.leave_when_stdin_ends()
    report = _report_json if json_lines else _report_in_words
    try:
        with contextlib.ExitStack() as stack, contextlib.ExitStack() as bars:
            if config.serve:
                stack.enter_context(running_in(config.data_dir))
            exposed = None if api is None else (api, stack.enter_context(listen(api)))
            tell = _JsonProgress(report) if json_lines else bars.enter_context(shown())
            trio.run(_serve, config, exposed, report, tell, bars.close)
    except* leaving.Leaving:
        report({"event": "leaving"})
    return failures.OK


Report = Callable[[dict[str, Any]], None]


async def _serve(
    config: NodeConfig,
    exposed: tuple[ApiConfig, socket.socket] | None,
    report: Report,
    progress: Progress | None,
    end_of_bars: Callable[[], None],
) -> None:
    serving = False
    leave = trio.Event()

    async with trio.open_nursery() as nursery:

        async def leave_when_told(task_status: trio.TaskStatus[None]) -> None:
            await leaving.wait_until_told_to_leave(task_status=task_status)
            leaving.leave_by_force_after(leaving.GRACE)
            report({"event": "leaving"})
            if serving:
                leave.set()  # not cancelled: saying goodbye takes the network
            else:
                nursery.cancel_scope.cancel()

        await nursery.start(leave_when_told)
        report({"event": "starting", "model": config.model})
        from ..node import Node

        async with Node(config, progress) as node, trio.open_nursery() as reporting:
            end_of_bars()
            if node.fetched:
                report(fetched.fetched_event(node.fetched))
            serving = True
            if config.serve:
                report(seed.seeding_event(node) if config.seed else serving_event(node))
                reporting.start_soon(_report_reachability, node, report)
            if exposed is not None:
                reporting.start_soon(_serve_api, node, *exposed, report)
            await leave.wait()
            reporting.cancel_scope.cancel()


async def _serve_api(
    node: "Node", config: ApiConfig, listening: socket.socket, report: Report
) -> None:
    from ..api import server

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, node, config, listening)
        report(
            {
                "event": "api",
                "url": url(listening),
                "page": page_url(listening),
                "model": node.model_name,
            }
        )


async def _report_reachability(node: "Node", report: Report) -> None:
    told = None
    while True:
        if node.reachability != told:
            told = node.reachability
            report(reachability_event(node))
        await node.reachability_changed()


def reachability_event(node: "Node") -> dict[str, Any]:
    """Whether others can dial the node, through whom they reach it, and that in words."""
    reachability, listen = node.reachability, node.config.listen
    ports = {port for address in listen if (port := address.rpartition("/tcp/")[2]) != "0"}
    return {
        "event": "reachability",
        "reach": reachability.reach,
        "relays": list(reachability.relays),
        "forwarded_port": reachability.forwarded_port,
        "multiaddrs": list(node.multiaddrs),
        "words": reachability.in_words(int(ports.pop()) if len(ports) == 1 else None),
    }


def serving_event(node: "Node") -> dict[str, Any]:
    """What is said once the node really serves; model and blocks are null for bootstrap peers."""
    span = node.span
    return {
        "event": "serving",
        "peer_id": node.peer_id,
        "multiaddr": next(iter(node.multiaddrs), None),
        "model": node.model_name if span else None,
        "blocks": [span.start, span.end] if span else None,
        "fingerprint": node.fingerprint,
    }


class _JsonProgress:
    """Reports what takes a while as events, once a second at most."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._due = 0.0

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if now >= self._due or step.done == step.total:
            self._due = now + 1
            self._report({"event": "progress", **dataclasses.asdict(step)})


def _report_json(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _report_in_words(event: dict[str, Any]) -> None:
    line = in_words(event)
    if event["event"] in ("serving", "seeding", "api"):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    else:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def in_words(event: dict[str, Any]) -> str:
    """An event as a line for people."""
    match event:
        case {"event": "serving", "blocks": [start, end], "model": model, "multiaddr": multiaddr}:
            at = multiaddr or "no address that others can dial yet"
            return f"Serving {model}, blocks {start}:{end}, at {at}"
        case {"event": "seeding"}:
            return seed.seeding_in_words(event)
        case {"event": "fetched"}:
            return fetched.fetched_in_words(event)
        case {"event": "api", "url": at, "page": page, "model": model}:
            return f"OpenAI-compatible API for {model} at {at}; for people, {page}"
        case {"event": "reachability", "words": words}:
            return str(words)
        case {"event": "serving", "multiaddr": multiaddr}:
            return f"Bootstrap peer at {multiaddr or 'no address that others can dial yet'}"
        case {"event": "starting", "model": str(model)}:
            return f"Loading {model} …"
        case {"event": "leaving"}:
            return "Leaving the swarm …"
        case _:
            return f"{event['event'].capitalize()} …"
