"""Machines on one machine: network namespaces, a wide area between them, and homes behind NAT.

    public ──┐       ┌── router ── home
             ├─ wan ─┤   (NAT)
    far ─────┘       └── gate ──── flat
                         (NAT)

Everything is made with ``ip`` and ``nft``, needs root, and is gone afterwards. Names carry our process
id, so that test runs don't meet.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

_RULES = """
table ip translation {
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
        iifname "inside" accept
    }
}
"""
_OUTSIDE = ("public", "far", "router", "gate")
_HOMES = {"router": "home", "gate": "flat"}


@dataclass(frozen=True)
class Internet:
    """The namespaces, for commands to run in, and their addresses."""

    public: str
    far: str
    home: str
    flat: str
    public_address: str


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
        yield Internet(names["public"], names["far"], names["home"], names["flat"], "203.0.113.2")


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
