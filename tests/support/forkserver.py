"""A process that has imported everything, and forks the commands that tests run.

Importing torch and transformers takes most of the ten seconds of processor time that a command needs to
start, and the tests start a hundred. A fork of a process that has imported them, and computed nothing
yet, is a process like any other: its own pid, memory, sockets and signals.

Started with one end of a Unix socket as its standard input. A request is a line of JSON (``argv``,
``env``) with four file descriptors: standard input, output and error of the command, and a pipe on
which its pid and then its exit status are told, a line each. Between the server and each command
stands a small process that waits for it.
"""

import ctypes
import gc
import io
import json
import os
import random  # noqa: TID251 - forks must not all draw the same
import signal
import socket
import sys
import traceback
from pathlib import Path

MAX_REQUEST = 1 << 20
_CLONE_NEWNET = 0x40000000


def main() -> None:
    """Serve requests until the other end of standard input is closed."""
    requests = socket.socket(fileno=os.dup(0))
    import bitsandbytes  # noqa: F401
    from petals.node import node, originate, relay, serving  # noqa: F401
    from petals.node.api import server  # noqa: F401
    from petals.node.cli import app, chat, generate, run, status  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, BloomForCausalLM  # noqa: F401

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.measured import share

    share(Path(os.environ["PETALS_TEST_MEASURED"]))
    gc.freeze()  # else collecting garbage writes to pages that all forks share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        message, fds, _, _ = socket.recv_fds(requests, MAX_REQUEST, 4)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _mind(json.loads(message), fds)
        for fd in fds:
            os.close(fd)


def _mind(request: dict[str, object], fds: list[int]) -> None:
    """Fork the command, and tell how it ends."""
    *streams, status = fds
    child = os.fork()
    if child == 0:
        os.close(status)
        _run(request, streams)
    for fd in streams:
        os.close(fd)
    os.write(status, b"%d\n" % child)
    _, code = os.waitpid(child, 0)
    os.write(status, b"%d\n" % os.waitstatus_to_exitcode(code))
    os._exit(0)


def _run(request: dict[str, object], streams: list[int]) -> None:
    """Be the command."""
    argv, env = request["argv"], request["env"]
    assert isinstance(argv, list) and isinstance(env, dict)
    code = 1
    try:
        os.setsid()
        if haste := env.pop("PETALS_TEST_HASTE", None):
            from support.haste import hurry

            hurry(float(haste))
        if network := env.pop("PETALS_TEST_NETWORK", None):
            _enter_network(network)
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
            os.close(fd)
        os.environ.clear()
        os.environ.update(env)
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8")
        sys.stderr = io.TextIOWrapper(
            io.FileIO(2, "w", closefd=False), encoding="utf-8", write_through=True
        )
        random.seed()
        sys.argv = ["petals-node", *argv]
        from petals.node.__main__ import main as run_command

        run_command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - there is nobody above
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _enter_network(name: str) -> None:
    """Be on that machine, as far as sockets go; threads to come inherit it."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")
    os.close(fd)


if __name__ == "__main__":
    main()
