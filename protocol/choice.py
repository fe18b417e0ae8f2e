"""Ask before a session opens: whom, and whether what they say changes the choice.

What a peer announced is up to a minute old, and all who plan in that minute plan by the same words:
they would all take the same fastest chain. The peers themselves know better.

Rules of this file:

* The hops of the best route are asked, and nobody else: whoever is asked expects the session, and
  tells those who ask next (``expected.py``), so that originators of the same moment spread. Who was
  passed over and is wanted after all is asked again.
* Another route is asked about if it is ``WORTHWHILE`` cheaper than the best one through those that
  have answered; ``MAX_ROUNDS`` times at most, since somebody waits. Then the answers decide: what
  nobody was asked about looks as idle as those looked that were given up.
* A peer that did not answer is left out, unless nobody else has its blocks.
* Where every candidate is on the route already there is nothing to choose, and nobody is asked.

Nothing here waits or does I/O: ``to_ask`` says whom to ask, ``heard`` takes the answers in.
"""

from collections.abc import Callable, Collection, Iterable

from .announcement import Announcement
from .errors import NoRoute
from .routing import Route, RouteHop

MAX_ROUNDS = 8
"""Of asking, each a round trip or two. An idle swarm takes one; more only come about where peers are
so busy that it is worth it."""
WORTHWHILE = 0.2
"""The share of a route's cost that is worth asking once more."""

Plan = Callable[[Collection[Announcement]], Route]
"""The best route through some candidates. Raises NoRoute."""


class Choice:
    """The choice of hops for one session that is about to open."""

    def __init__(self, candidates: Iterable[Announcement], plan: Plan) -> None:
        """Raises NoRoute if there is no choice."""
        self._known = {peer.peer_id: peer for peer in candidates}
        self._plan = plan
        self._answered: set[str] = set()
        self._silent: set[str] = set()
        self._expecting: set[str] = set()
        """Asked, and on the route ever since."""
        self._rounds = 0
        self._route = plan(self._known.values())

    @property
    def route(self) -> Route:
        """The best route, as far as is known."""
        return self._route

    def to_ask(self) -> list[RouteHop]:
        """Whom to ask next, all at once; nobody: the choice is made."""
        hops = self._route.hops
        if self._rounds == MAX_ROUNDS or len(hops) == len(self._known):
            return []
        return [hop for hop in hops if hop.peer_id not in self._expecting]

    def heard(self, asked: Iterable[RouteHop], answers: Iterable[Announcement]) -> None:
        """Take in what those that were asked say of themselves now; some may have said nothing."""
        self._rounds += 1
        wanted = {hop.peer_id for hop in asked}
        told = {peer.peer_id: peer for peer in answers}
        self._known |= told
        self._answered = (self._answered - wanted) | told.keys()
        self._silent = (self._silent | wanted) - told.keys()
        self._route = self._best()
        self._expecting = (self._expecting | wanted) & {hop.peer_id for hop in self._route.hops}

    def _best(self) -> Route:
        hoped = self._through(self._known.keys() - self._silent)
        if hoped is None:
            return self._route  # whoever is silent has to do
        sure = self._through(self._answered)
        if sure is None or (
            self._rounds < MAX_ROUNDS and hoped.cost <= (1 - WORTHWHILE) * sure.cost
        ):
            return hoped
        return sure

    def _through(self, peers: Collection[str]) -> Route | None:
        try:
            return self._plan([peer for peer in self._known.values() if peer.peer_id in peers])
        except NoRoute:
            return None
