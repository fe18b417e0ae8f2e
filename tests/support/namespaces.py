"""Machines on one machine: network namespaces, a wide area between them, and a home behind NAT.

    public ──┐
    far ─────┤ wan ── router ── home
    router ──┘        (NAT)

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
HOME = "192.168.77.2"


@dataclass(frozen=True)
class Internet:
    """The namespaces, for commands to run in, and their addresses."""

    public: str
    far: str
    home: str
    public_address: str
    router_address: str
    """What the world sees of the home."""


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
    """A public host, one far away, and a home whose router lets nobody in."""
    names = {
        each: f"petals-{each}-{os.getpid()}" for each in ("wan", "public", "far", "router", "home")
    }
    with contextlib.ExitStack() as stack:
        for name in names.values():
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
            _inside(name, "ip", "link", "set", "lo", "up")
        for number, host in enumerate(("public", "far", "router")):
            _join(
                (names["wan"], host, f"203.0.113.{4 * number + 1}"),
                (names[host], "outside", f"203.0.113.{4 * number + 2}"),
            )
            _inside(
                names[host], "ip", "route", "add", "default", "via", f"203.0.113.{4 * number + 1}"
            )
        _join((names["router"], "inside", "192.168.77.1"), (names["home"], "lan", HOME))
        _inside(names["home"], "ip", "route", "add", "default", "via", "192.168.77.1")
        for router in ("wan", "router"):
            _inside(names[router], "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        _inside(names["router"], "nft", "-f", "-", text=_RULES)
        yield Internet(names["public"], names["far"], names["home"], "203.0.113.2", "203.0.113.10")


def _join(*ends: tuple[str, str, str]) -> None:
    """A cable between two namespaces: (namespace, interface, address) of each end."""
    (one, one_link, _), (other, other_link, _) = ends
    _ip(
        *("link", "add", one_link, "netns", one, "type", "veth"),
        *("peer", "name", other_link, "netns", other),
    )
    for name, link, address in ends:
        _inside(name, "ip", "address", "add", f"{address}/30", "dev", link)
        _inside(name, "ip", "link", "set", link, "up")


def _inside(name: str, *command: str, text: str | None = None) -> None:
    _run("ip", "netns", "exec", name, *command, text=text)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str, text: str | None = None) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, input=text)
