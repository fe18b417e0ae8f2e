"""Commands that a person types, in processes of their own, against a live swarm."""

import json
import os
import pty
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from petals.inference.sampling_params import SamplingParams
from support.processes import (
    COMMAND,
    DEADLINE,
    CommandProcess,
    ProcessSwarm,
    environment,
    run_command,
)
from support.reference import ReferenceModel

TURN = SamplingParams(max_new_tokens=12, repetition_penalty=1.3)


def test_a_chat_goes_on_from_everything_said_before(
    demo: ReferenceModel, tmp_swarm: ProcessSwarm
) -> None:
    tmp_swarm.serve("demo", "0:4", "4:8")
    turns = ("And God said", " unto the people", " of the land")
    history: list[int] = []
    answers = []
    for turn in turns:
        history += demo.tokenizer(turn + "\n")["input_ids"]
        answer = demo.generate_from(history, TURN)
        answers.append(demo.tokenizer.decode(answer, skip_special_tokens=True))
        history += answer
    done = run_command(
        *("chat", "--bootstrap", tmp_swarm.address, "--max-new-tokens", "12"),
        *("--repetition-penalty", "1.3", "--dtype", "float32"),
        text="".join(f"{turn}\n" for turn in turns),
    )
    assert done.returncode == 0, done.stderr
    lines = [answer if answer.endswith("\n") else answer + "\n" for answer in answers]
    assert done.stdout == "".join(lines)


def until(process: CommandProcess, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first status that a watching process writes of which that is true."""
    while not condition(status := json.loads(process.line())):
        pass
    return dict(status)


def test_status_shows_what_changes_until_it_is_told_to_leave(tmp_swarm: ProcessSwarm) -> None:
    with CommandProcess("status", "--watch", "--json", "--bootstrap", tmp_swarm.address) as watch:
        until(watch, lambda status: not status["models"])
        [node] = tmp_swarm.serve("demo", "0:3")

        def serves(status: dict[str, Any]) -> bool:
            return any(model["coverage"][:3] == [1, 1, 1] for model in status["models"])

        status = until(watch, serves)
        [model] = status["models"]
        [peer] = model["peers"]
        assert (peer["peer_id"], peer["reachability"]) == (node.peer_id, "direct")
        assert model["throughput"][0] > 0
        node.send_signal(signal.SIGTERM)
        until(watch, lambda status: not status["models"])
        watch.send_signal(signal.SIGINT)
        assert watch.wait() == 0, watch.errors
        assert watch.errors == ""


def test_status_in_a_terminal_is_drawn_again_and_ends_with_ctrl_c(tmp_swarm: ProcessSwarm) -> None:
    tmp_swarm.serve("demo", "0:8")
    control, terminal = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "status", "--watch", "--bootstrap", tmp_swarm.address],
        env=environment(TERM="xterm", COLUMNS="80", LINES="40", NO_COLOR="1"),
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    shown = ""
    watchdog = threading.Timer(DEADLINE, process.kill)  # ends the reading below
    watchdog.start()
    try:
        while shown.count("Ctrl-C ends") < 2:
            shown += os.read(control, 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        os.close(control)
    assert "nodes     11111111" in shown
    assert "Traceback" not in shown


def test_status_of_a_model_that_nobody_serves(tmp_swarm: ProcessSwarm) -> None:
    done = run_command("status", "--model", "nobody/has-this", "--bootstrap", tmp_swarm.address)
    assert (done.returncode, done.stdout) == (0, "No peer serves a model here.\n")
