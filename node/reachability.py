"""Whether others can dial this node: the words for it, and how the answers of peers are judged.

No I/O here and no libp2p: ``libp2p_reachability`` asks, this file decides and explains.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

REACHABILITIES = ("auto", "public", "private")
"""What a user may insist on; ``auto``: find out."""


class Reach(StrEnum):
    """Whether others can dial a node."""

    PUBLIC = "public"
    PRIVATE = "private"
    """They cannot: it is reached through relays."""
    UNKNOWN = "unknown"
    """Nobody could be asked yet."""


@dataclass(frozen=True)
class Reachability:
    """How this node is reached."""

    reach: Reach
    relays: tuple[str, ...] = ()
    """Peer ids of the relays through which a private one is reached."""
    insisted: bool = False
    """Whether the user said so, and nobody was asked."""
    forwarded_port: int | None = None
    """The port of the router that it says it forwards to this machine."""

    def in_words(self, port: int | None) -> str:
        """One line that says what is the case and what to do; ``port`` is the one listened on."""
        forward = "forward a TCP port of your router to it (--listen, --announce)"
        if port is not None:
            forward = f"forward TCP port {port} of your router to this machine"
        router = f"its router forwards TCP port {self.forwarded_port} to it (UPnP)"
        forwarded = self.forwarded_port is not None
        if self.reach is Reach.UNKNOWN:
            hope = f"; {router}" if forwarded else ""
            return f"Reachability: unknown, for there is no peer to ask yet{hope}."
        if self.reach is Reach.PUBLIC:
            how = "as you say" if self.insisted else "peers can dial this node"
            why = f": {router}" if forwarded else ""
            return f"Reachability: public, {how}{why}. Nothing to do."
        how = "as you say" if self.insisted else "peers cannot dial this node"
        if forwarded:
            how += f", though {router}"
            forward = (
                "have the router behind that one, if there is one, forward TCP port "
                f"{self.forwarded_port}, too"
            )
        if not self.relays:
            return (
                f"Reachability: private, {how}, and no peer relays for it yet: nobody can use its "
                f"blocks. Name a --bootstrap peer that can be dialled, or {forward}."
            )
        through = " and ".join(relay[-6:] for relay in self.relays)
        advice = "" if self.insisted else f" For more speed, {forward}."
        return f"Reachability: private, {how}; they reach it through {through}.{advice}"


@dataclass(frozen=True)
class Vote:
    """What one peer found when it dialled us."""

    reached: bool
    outside: bool
    """Whether it sees us at an address that is not this machine's: there is a router between."""


def verdict(votes: Iterable[Vote]) -> Reach:
    """What the answers of peers together say.

    Who is on our own side of the router can always dial us, and cannot tell about the world: if
    anybody answers from outside, only those count. Of them the majority decides, so that one peer
    that lies or fails does not; a tie is taken for private, which always works.
    """
    cast = list(votes)
    counted = [vote for vote in cast if vote.outside] or cast
    if not counted:
        return Reach.UNKNOWN
    reached = sum(vote.reached for vote in counted)
    return Reach.PUBLIC if 2 * reached > len(counted) else Reach.PRIVATE
