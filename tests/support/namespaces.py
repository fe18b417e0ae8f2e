"""Machines on one machine: network namespaces, a wide area between them, and homes behind NAT.

    public ──┐       ┌── router ── home
             ├─ wan ─┤   (NAT)
    far ─────┘       └── gate ──── flat
                         (NAT)

Everything is made with ``ip`` and ``nft``, needs root, and is gone afterwards. Names carry our process
id, so that test runs don't meet.
"""

import contextlib
import ctypes
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio
from support.fake_router import FakeRouter, Forward

_RULES = """
table ip translation {
    chain prerouting {
        type nat hook prerouting priority -100;
    }
    chain postrouting {
        type nat hook postrouting priority 100;
        oifname "outside" masquerade
    }
}
table ip firewall {
    chain input {
        type filter hook input priority 0; policy accept;
        iifname "outside" ct state new drop
    }
    chain forward {
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        ct status dnat accept
        iifname "inside" accept
    }
}
"""
_OUTSIDE = ("public", "far", "router", "gate")
_HOMES = {"router": "home", "gate": "flat"}
_CLONE_NEWNET = 0x40000000
_ROUTER_DEADLINE = 30.0


@dataclass(frozen=True)
class Internet:
    """The namespaces, for commands to run in, and their addresses."""

    public: str
    far: str
    home: str
    flat: str
    public_address: str
    router: str
    """Home's."""
    router_address: str
    """On the outer side."""


def missing() -> str | None:
    """Why no namespaces can be made here; None: they can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    for program, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(program) is None:
            return f"needs `{program}` (apt-get install {package})"
    name = f"petals-try-{os.getpid()}"
    try:
        _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        return f"needs network namespaces: {error.stderr.strip()}"
    try:
        _inside(name, "nft", "-f", "-", text=_RULES)
    except subprocess.CalledProcessError as error:
        return f"needs NAT in the kernel: {error.stderr.strip()}"
    finally:
        _ip("netns", "delete", name)
    return None


@contextlib.contextmanager
def internet() -> Iterator[Internet]:
    """A public host, one far away, and two homes whose routers let nobody in."""
    machines = ("wan", *_OUTSIDE, *_HOMES.values())
    names = {each: f"petals-{each}-{os.getpid()}" for each in machines}
    with contextlib.ExitStack() as stack:
        for name in names.values():
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
            _inside(name, "ip", "link", "set", "lo", "up")
        for number, host in enumerate(_OUTSIDE):
            _join(names["wan"], host, names[host], "outside", f"203.0.113.{4 * number}")
        for number, (router, home) in enumerate(_HOMES.items()):
            _join(names[router], "inside", names[home], "lan", f"192.168.77.{4 * number}")
            _inside(names[router], "nft", "-f", "-", text=_RULES)
        for router in ("wan", *_HOMES):
            _inside(names[router], "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        yield Internet(
            public=names["public"],
            far=names["far"],
            home=names["home"],
            flat=names["flat"],
            public_address="203.0.113.2",
            router=names["router"],
            router_address="203.0.113.10",
        )


@contextlib.contextmanager
def forwarding_router(internet: Internet) -> Iterator[FakeRouter]:
    """Home's router does as it is told over UPnP, meanwhile."""

    def apply(table: Mapping[int, Forward]) -> None:
        rules = [
            f'add rule ip translation prerouting iifname "outside" tcp dport {outer} '
            f"dnat to {entry.host}:{entry.port}"
            for outer, entry in table.items()
        ]
        text = "\n".join(["flush chain ip translation prerouting", *rules])
        _inside(internet.router, "nft", "-f", "-", text=text)

    router = FakeRouter(host="192.168.77.1", outer_host=internet.router_address, applied=apply)
    started: queue.Queue[trio.CancelScope | None] = queue.Queue()
    token: list[trio.lowlevel.TrioToken] = []

    async def serve() -> None:
        token.append(trio.lowlevel.current_trio_token())
        async with trio.open_nursery() as nursery:
            await nursery.start(
                lambda task_status: router.serve(multicast=True, task_status=task_status)
            )
            started.put(nursery.cancel_scope)

    def run() -> None:
        try:
            _enter(internet.router)
            trio.run(serve)
        finally:
            started.put(None)

    thread = threading.Thread(target=run)
    thread.start()
    scope = started.get(timeout=_ROUTER_DEADLINE)
    assert scope is not None, "the router did not start"
    try:
        yield router
    finally:
        token[0].run_sync_soon(scope.cancel)
        thread.join()


def _enter(name: str) -> None:
    """Be on that machine from now on, as far as the sockets of this thread go."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{name}").open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


def _join(router: str, router_link: str, host: str, host_link: str, network: str) -> None:
    """A cable: a /30 of its own, the router's end first, which is the host's way to everywhere."""
    prefix, _, first = network.rpartition(".")
    inner, outer = (f"{prefix}.{int(first) + each}" for each in (1, 2))
    _ip(
        *("link", "add", router_link, "netns", router, "type", "veth"),
        *("peer", "name", host_link, "netns", host),
    )
    for name, link, address in ((router, router_link, inner), (host, host_link, outer)):
        _inside(name, "ip", "address", "add", f"{address}/30", "dev", link)
        _inside(name, "ip", "link", "set", link, "up")
    _inside(host, "ip", "route", "add", "default", "via", inner)


def _inside(name: str, *command: str, text: str | None = None) -> None:
    _run("ip", "netns", "exec", name, *command, text=text)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str, text: str | None = None) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, input=text)
