"""Being a member: telling the swarm about this node, and keeping the Swarm fresh.

Rules of this file: it talks to the ``Directory`` only, each time with a deadline. A directory that
fails is logged and asked again; it never ends the task. Whatever is read there was written by
strangers and goes through ``decode_signed``.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import trio

from ..protocol.announcement import (
    SWARM_KEY,
    Announcement,
    PeerState,
    decode_signed,
    encode_signed,
    model_key,
    region_keys,
    weights_key,
)
from ..protocol.dice import Dice
from ..protocol.errors import PeerError, PetalsError, RemoteProtocolError
from ..protocol.span import Span
from ..protocol.swarm import Swarm, model_mismatch
from ..protocol.tally import Totals, agreed
from ..protocol.upkeep import Upkeep, sampled, upkeep
from .network import Directory

log = logging.getLogger(__name__)

Describe = Callable[[int, float], Announcement | None]
"""Says what this node is now, given the sequence and the expiry to say it with; None: nothing that
the swarm needs to know (the node serves no model)."""

INDEX_WRITERS = 128
"""How many nodes of a model, about, are listed by name. That is sample enough to find the model,
and keeps the few keys of the list from getting busier as the swarm grows."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MembershipSettings:
    """How patiently; seconds, if nothing else is said. How often: ``protocol/upkeep.py``."""

    first_retry: float = 1.0
    """Before the next try when nobody took an announcement; doubles up to the interval."""
    shortest_interval: float = 5.0
    """Between two announcements, however often something changes."""
    timeout: float = 10.0
    """For one key of the directory. A frozen peer can hold an operation up for 20 s."""
    leave_timeout: float = 2.0
    """A node that is told to stop is gone within 5 s, whoever listens."""
    concurrency: int = 8
    """Keys of the directory that are written, or read, at once."""


@dataclass(slots=True)
class _Refresh:
    """A refresh under way, for those who wait for it."""

    finished: trio.Event = field(default_factory=trio.Event)
    complete: bool = False
    """Whether it ran to its end; else its caller was cancelled and somebody else must do it."""
    error: str | None = None


class Membership:
    """This node's part in what the swarm knows about itself."""

    def __init__(
        self,
        directory: Directory,
        swarm: Swarm,
        *,
        sign: Callable[[bytes], bytes],
        describe: Describe,
        clock: Callable[[], float],
        dice: Dice,
        settings: MembershipSettings | None = None,
    ) -> None:
        """``clock`` tells unix time; ``sign`` signs with the key behind this node's peer id."""
        self._directory = directory
        self._swarm = swarm
        self._sign = sign
        self._describe = describe
        self._clock = clock
        self._dice = dice
        self._settings = settings or MembershipSettings()
        self._limiter = trio.CapacityLimiter(self._settings.concurrency)
        self._sequence = 0
        self._own: Announcement | None = None
        self._regions: frozenset[bytes] = frozenset()
        self._left = False
        self._changed = trio.Event()
        self._watched: dict[tuple[str, int], None] = {}
        self._under_way: dict[tuple[str, int], _Refresh] = {}
        self._refreshed_at: dict[tuple[str, int], float] = {}
        self._known = 0
        self._sampled: dict[tuple[str, int], bool] = {}

    @property
    def own(self) -> Announcement | None:
        """What this node last announced."""
        return self._own

    @property
    def upkeep(self) -> Upkeep:
        """How often to tell and to ask, in a swarm of this size."""
        return upkeep(self._size())

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Announce and refresh until cancelled. Started when the first announcement was tried."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._announce_forever)
            nursery.start_soon(self._refresh_forever)
            task_status.started()

    def changed(self) -> None:
        """Something worth knowing has changed: announce it soon."""
        self._changed.set()

    def describe(self) -> bytes | None:
        """This node as it is now, signed: for a peer that asks it directly."""
        announcement = self._current()
        return None if announcement is None else encode_signed(announcement, self._sign)

    async def announce(self) -> int | None:
        """Say what this node is now.

        Returns how many holders took it, at the key where fewest did; None when there is nothing
        to say. Does not raise when the directory fails.
        """
        announcement = None if self._left else self._current()
        if announcement is None or (announcement.span is None and not announcement.shards):
            return None
        listed = self._dice.random() * self._size() < INDEX_WRITERS
        # the regions of the last announcement, too: nobody shall look for this node where it was
        span = announcement.span
        keys = set() if span is None else set(region_keys(announcement.model, span))
        if announcement.moving_to is not None:  # where it counts already
            keys |= {*region_keys(announcement.model, announcement.moving_to)}
        elsewhere = self._regions - keys
        self._own, self._regions = announcement, frozenset(keys)
        if listed or span is None:
            keys |= _index(announcement)
        entry = encode_signed(announcement, self._sign)
        taken = await self._put(keys | elsewhere, entry, self._limiter)
        return min(taken[key] for key in keys)

    async def leave(self) -> None:
        """Say that this node is gone, and nothing after that. In time, and even if cancelled."""
        self._left = True
        latest = self._current()
        if self._own is None or latest is None:
            return
        gone = replace(latest, state=PeerState.OFFLINE, span=self._own.span)
        entry = encode_signed(gone, self._sign)
        # a limiter of its own: announcements that hang must not be in the way
        limiter = trio.CapacityLimiter(self._settings.concurrency)
        with trio.move_on_after(self._settings.leave_timeout, shield=True):
            await self._put(self._regions | _index(gone), entry, limiter)

    def watch(self, fingerprint: str, num_blocks: int) -> None:
        """Keep the Swarm fresh for this model from now on."""
        self._watched[fingerprint, num_blocks] = None

    async def refresh(self, fingerprint: str, num_blocks: int, *, max_age: float = 0.0) -> None:
        """Bring the Swarm up to date for a model.

        Does nothing if that was done less than ``max_age`` seconds ago; joins a refresh that is
        under way. Raises PeerError when the directory could be read for no region of the model.
        """
        await trio.lowlevel.checkpoint()
        model = fingerprint, num_blocks
        if trio.current_time() - self._refreshed_at.get(model, float("-inf")) < max_age:
            return
        while (refresh := self._under_way.get(model)) is not None:
            await refresh.finished.wait()
            if refresh.complete:
                break
        else:
            refresh = self._under_way[model] = _Refresh()
            try:
                refresh.error = await self._read_regions(fingerprint, num_blocks)
                refresh.complete = True
            finally:
                del self._under_way[model]
                refresh.finished.set()
        if refresh.error is not None:
            raise PeerError(refresh.error)

    def shows_a_sample(self, fingerprint: str, num_blocks: int) -> bool:
        """Whether the last reading of a model showed only some of its nodes (``upkeep.sampled``)."""
        return self._sampled.get((fingerprint, num_blocks), False)

    async def holders(self, fingerprint: str) -> None:
        """Bring into the Swarm a sample of those who have weights of a model to give.

        Raises PeerError when the directory cannot be read.
        """
        now = self._clock()
        for announcement in self._decoded(await self._get(weights_key(fingerprint))):
            if announcement.model == fingerprint:
                self._swarm.update(announcement, now)

    async def find(self, model_name: str | None = None) -> list[Announcement]:
        """Peers listed under a model's name, whatever its fingerprint; under any name if None.

        A sample of them in a large swarm. Raises PeerError when the directory cannot be read.
        """
        entries = await self._get(SWARM_KEY if model_name is None else model_key(model_name))
        found = [peer for peer in self._decoded(entries) if peer.state is not PeerState.OFFLINE]
        return [peer for peer in found if model_name in (None, peer.model_name)]

    async def totals(self, fingerprint: str, num_blocks: int) -> Totals | None:
        """What each block has, as the holders of its announcements count it; None: nobody says."""
        keys = region_keys(fingerprint, Span(0, num_blocks))
        answers: dict[bytes, list[bytes]] = {key: [] for key in keys}

        async def ask(key: bytes) -> None:
            try:
                answers[key] = await self._within_limits(
                    lambda: self._directory.sums(key), self._limiter
                )
            except PetalsError as error:
                log.debug("asking for the sums of %s failed: %s", key.decode(), error)

        async with trio.open_nursery() as nursery:
            for key in keys:
                nursery.start_soon(ask, key)
        return agreed([answers[key] for key in keys], num_blocks)

    async def check_model(self, model_name: str, fingerprint: str) -> None:
        """Raise ModelMismatch if peers serve a model of that name, but none serves this very one.

        Raises PeerError when the directory cannot be read.
        """
        mismatch = model_mismatch(await self.find(model_name), model_name, fingerprint)
        if mismatch is not None:
            raise mismatch

    def _size(self) -> int:
        # most that the last reading brought may have expired: the swarm is no smaller for that
        return max(self._known, len(self._swarm.peers(self._clock())))

    def _current(self) -> Announcement | None:
        # unix milliseconds: higher after a restart than whatever was said before it
        now = self._clock()
        self._sequence = max(self._sequence + 1, int(now * 1000))
        return self._describe(self._sequence, now + self.upkeep.time_to_live)

    async def _announce_forever(self, *, task_status: trio.TaskStatus[None]) -> None:
        settings = self._settings
        retry = settings.first_retry
        started = False
        while True:
            self._changed = trio.Event()
            taken = await self.announce()
            if not started:
                started = True
                task_status.started()
            pause = self._jittered(self.upkeep.announce_interval)
            if taken == 0:
                pause = min(pause, retry)
                # to be expected of a swarm's first node
                log.info(
                    "no peer took this node's announcement; next try in %g s (is a peer "
                    "reachable, and is the clock of this machine right?)",
                    pause,
                )
                retry *= 2
            else:
                retry = settings.first_retry
            await trio.sleep(min(pause, settings.shortest_interval))
            with trio.move_on_after(max(0.0, pause - settings.shortest_interval)):
                await self._changed.wait()

    async def _refresh_forever(self) -> None:
        while True:
            for fingerprint, num_blocks in list(self._watched):
                try:
                    await self.refresh(fingerprint, num_blocks)
                except PeerError as error:
                    log.info("%s", error)
            self._swarm.expire(self._clock())
            await trio.sleep(self._jittered(self.upkeep.refresh_interval))

    def _jittered(self, interval: float) -> float:
        return interval * (0.9 + 0.2 * self._dice.random())

    async def _read_regions(self, fingerprint: str, num_blocks: int) -> str | None:
        """Read all regions of a model into the Swarm; if none could be read, the reason why."""
        keys = region_keys(fingerprint, Span(0, num_blocks))
        errors: list[str] = []

        async def read(key: bytes) -> None:
            try:
                entries = await self._get(key)
            except PetalsError as error:
                log.debug("reading %s failed: %s", key.decode(), error)
                errors.append(str(error))
                return
            now = self._clock()
            for announcement in self._decoded(entries):
                if announcement.model == fingerprint and announcement.num_blocks == num_blocks:
                    self._swarm.update(announcement, now)

        async with trio.open_nursery() as nursery:
            for key in keys:
                nursery.start_soon(read, key)
        if len(errors) == len(keys):
            return f"cannot find out who serves the model: {errors[0]}"
        self._refreshed_at[fingerprint, num_blocks] = trio.current_time()
        known = self._swarm.peers(self._clock(), fingerprint)
        self._known = len(known)
        self._sampled[fingerprint, num_blocks] = sampled(known, num_blocks)
        return None

    def _decoded(self, entries: Iterable[bytes]) -> list[Announcement]:
        now = self._clock()
        announcements = []
        for entry in entries:
            try:
                announcements.append(decode_signed(entry, now))
            except RemoteProtocolError as error:
                log.debug("ignored: %s", error)
        return announcements

    async def _get(self, key: bytes) -> list[bytes]:
        return await self._within_limits(lambda: self._directory.get(key), self._limiter)

    async def _put(
        self, keys: Iterable[bytes], entry: bytes, limiter: trio.CapacityLimiter
    ) -> dict[bytes, int]:
        """Write ``entry`` at all keys; how many holders took it, by key."""
        taken: dict[bytes, int] = {}

        async def put(key: bytes) -> None:
            try:
                taken[key] = await self._within_limits(
                    lambda: self._directory.put(key, entry), limiter
                )
            except PetalsError as error:
                log.debug("announcing at %s failed: %s", key.decode(), error)
                taken[key] = 0

        async with trio.open_nursery() as nursery:
            for key in keys:
                nursery.start_soon(put, key)
        return taken

    async def _within_limits(
        self, action: Callable[[], Awaitable[T]], limiter: trio.CapacityLimiter
    ) -> T:
        async with limiter:
            with trio.move_on_after(self._settings.timeout):
                return await action()
        raise PeerError(f"the directory gave no answer in {self._settings.timeout:g} s")


def _index(announcement: Announcement) -> set[bytes]:
    """The keys where a model is listed by name, and by its weights if there are some to give."""
    keys = {model_key(announcement.model_name), SWARM_KEY}
    return keys | {weights_key(announcement.model)} if announcement.shards else keys
