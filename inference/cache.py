"""The KV cache of a session, and the budget that all sessions of a node share.

A session has ``batch`` **lanes**, one for each row of its batch. Lane b's first ``padding[b]``
positions are left padding: they are never computed and never cached, so a lane's own position is
``max(0, position - padding[b])`` and its attention sees real tokens only.

Per lane and block, keys and values lie head-major, ``[heads, capacity, head_dim]``: what attention
reads of a head is one piece of memory, in order.

Capacity grows as tokens come, by an eighth to a quarter, up to what the session reserved: a session
that reserves much and uses little costs little. What growing copies for a token is little beside what
attention reads for it; blocks grow at different tokens, so that none has to wait for much of it. For
a step of many rows, room is made at once. The memory of a cache is not used again for another: fresh
pages cost about 2 % of a prefill.
"""

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..protocol.errors import CacheFull, LocalProtocolError
from .lanes import CachedLanes, IntArray, lane_memory

_LEAST_GROWTH = 32
"""Tokens; room for twice as many is made at most, or for a quarter of those that are there."""
_STAGGERED = 8
"""Of so many consecutive blocks, each grows by another number of tokens."""
_layouts = itertools.count(1)
_RETRY_AFTER = 5.0
"""Seconds; about what a short answer takes. Nobody knows when a session will end."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a cached token of one block looks like."""

    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in one block."""
        return 2 * self.heads * self.head_dim * self.dtype.itemsize


class LaneCache:
    """Keys and values of one row of a session's batch, for every block that the session uses."""

    def __init__(self, shape: CacheShape, max_tokens: int) -> None:
        self.length = 0
        """Tokens that every block has consumed."""
        self._shape = shape
        self._max_tokens = max_tokens
        self._expected = 0
        self._blocks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._key_norms: dict[int, torch.Tensor] = {}
        self._memory: IntArray = np.zeros((0, 4), np.int64)  # of each block, once it has any
        self.layout = 0
        """Of the memory: no other cache, and not this one after it grew or shrank, ever has the same."""
        self.together: tuple[object, CachedLanes] | None = None
        """What this lane and others had cached in their last round, and when that still holds."""

    def expect(self, length: int) -> None:
        """The cache will soon hold ``length`` tokens: when it next grows, it grows to that."""
        self._expected = length

    def copy_from(
        self, other: "LaneCache", length: int, at_once: int
    ) -> Generator[None, None, None]:
        """Hold the first ``length`` tokens of ``other`` at the end; needs an empty cache.

        Yields after about every ``at_once`` bytes. Given up in between, the cache is still empty.
        """
        copied = 0
        self.expect(length)
        for block, cached in other._blocks.items():
            with torch.inference_mode():  # as in a round; never across a yield
                for own, theirs in zip(self._room(block, length), cached, strict=True):
                    own[:, :length] = theirs[:, :length]
                self.key_norms(block).copy_(other.key_norms(block))
            copied += self._shape.bytes_per_token * length
            if copied >= at_once:
                copied = 0
                yield
        self.length = length

    def change_places(self, other: "LaneCache") -> None:
        """Each has what the other had reserved: they change sessions, with their memory."""
        self._max_tokens, other._max_tokens = other._max_tokens, self._max_tokens

    def become(self, other: "LaneCache") -> None:
        """Hold what ``other`` holds, in the memory that is here."""
        self.length = 0
        for block, cached in other._blocks.items():
            for own, theirs in zip(self._room(block, other.length), cached, strict=True):
                own[:, : other.length] = theirs[:, : other.length]
            self.key_norms(block).copy_(other.key_norms(block))
        self.length = other.length

    def shrink(self, at_once: int) -> Generator[None, None, None]:
        """Give back the memory behind ``length`` where it is much. Whoever has views keeps it.

        Yields after about every ``at_once`` bytes copied.
        """
        copied = 0
        for block in list(self._blocks):
            keys, values = self._blocks[block]  # as they are now: rounds may have run in between
            if keys.shape[1] <= _capacity(_STAGGERED - 1, self.length, self._max_tokens):
                continue
            kept = slice(0, self.length)
            with torch.inference_mode():
                self._hold(
                    block,
                    keys[:, kept].clone(memory_format=torch.contiguous_format),
                    values[:, kept].clone(memory_format=torch.contiguous_format),
                )
            copied += self._shape.bytes_per_token * self.length
            if copied >= at_once:
                copied = 0
                yield

    def append(
        self, block: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``[heads, rows, head_dim]`` behind the ``length`` cached tokens of ``block``.

        Returns keys and values of all ``length + rows`` tokens as views of the cache. ``length``
        stays: the caller raises it once all blocks have run, so that a round that fails half-way
        leaves nothing behind.
        """
        total = self.length + keys.shape[1]
        cached_keys, cached_values = self.make_room(block, keys.shape[1])
        cached_keys[:, self.length : total] = keys
        cached_values[:, self.length : total] = values
        if keys.shape[1] and self.device.type == "cpu":  # elsewhere nobody asks
            norms = cached_keys[:, self.length : total].float().norm(dim=2).amax(dim=1)
            torch.maximum(known := self.key_norms(block), norms, out=known)
        return cached_keys[:, :total], cached_values[:, :total]

    def make_room(self, block: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of ``block``, ``[heads, capacity, head_dim]``.

        There is room for ``rows`` tokens behind ``length``, which the caller writes; who writes keys
        raises ``key_norms``.
        """
        return self._room(block, self._with(rows))

    def memory(self, blocks: range, rows: int) -> IntArray:
        """``make_room`` in consecutive ``blocks``: for each its ``lane_memory``, int64 ``[blocks, 4]``.

        Good until a block next grows or shrinks.
        """
        total = self._with(rows)
        memory = self._memory[blocks.start : blocks.stop]
        if len(memory) < len(blocks) or memory[:, 3].min() < total:
            for block in blocks:
                self._room(block, total)
            memory = self._memory[blocks.start : blocks.stop]
        return memory

    def _with(self, rows: int) -> int:
        total = self.length + rows
        if total > self._max_tokens:
            raise LocalProtocolError(f"{total} tokens in a cache reserved for {self._max_tokens}")
        return total

    def key_norms(self, block: int) -> torch.Tensor:
        """fp32 ``[heads]``, on the CPU: no key of ``block`` has had a greater norm; NaN if one had.

        So much a query can hear of keys at most, without reading them.
        """
        if block not in self._key_norms:
            self._key_norms[block] = torch.zeros(self._shape.heads)
        return self._key_norms[block]

    @property
    def device(self) -> torch.device:
        """Where the keys and values are."""
        return self._shape.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self._shape.dtype

    def _room(self, block: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        old = self._blocks.get(block)
        capacity = 0 if old is None else old[0].shape[1]
        if old is not None and total <= capacity:
            return old
        capacity = _capacity(block, max(total, self._expected), self._max_tokens)
        size = (self._shape.heads, capacity, self._shape.head_dim)
        keys = torch.empty(size, dtype=self._shape.dtype, device=self._shape.device)
        values = torch.empty_like(keys)
        if old is not None:
            keys[:, : self.length] = old[0][:, : self.length]
            values[:, : self.length] = old[1][:, : self.length]
        self._hold(block, keys, values)
        return keys, values

    def _hold(self, block: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._blocks[block] = keys, values
        if block >= len(self._memory):
            grown = np.zeros((block + 1, 4), np.int64)
            grown[: len(self._memory)] = self._memory
            self._memory = grown
        self._memory[block] = lane_memory(keys, values, self.key_norms(block))
        self.layout = next(_layouts)


def _capacity(block: int, tokens: int, most: int) -> int:
    """How much room there should be in ``block`` for ``tokens``, which never are more than ``most``."""
    growth = max(_LEAST_GROWTH, tokens // 8)
    growth += growth * (block % _STAGGERED) // _STAGGERED
    return min(tokens + growth, most)


class SessionCache:
    """The lanes of one session and the position that they hold."""

    def __init__(
        self, shape: CacheShape, *, batch: int, max_tokens: int, padding: Sequence[int] = ()
    ) -> None:
        padding = tuple(padding) or (0,) * batch
        if batch < 1 or max_tokens < 1:
            raise LocalProtocolError(
                f"a session needs batch >= 1 and max_tokens >= 1, got {batch} and {max_tokens}"
            )
        if len(padding) != batch or any(not 0 <= skipped < max_tokens for skipped in padding):
            raise LocalProtocolError(
                f"padding must give {batch} numbers from 0 to {max_tokens - 1}, got {padding}"
            )
        self.max_tokens = max_tokens
        self.padding = padding
        self.unpadded_from = max(padding)
        """From this position on, no lane has padding."""
        self.lanes = tuple(LaneCache(shape, max_tokens - skipped) for skipped in padding)
        self.position = 0
        """Tokens of the session that are cached, padding included."""

    def padding_rows(self, lane: int, position: int, rows: int) -> int:
        """How many of the ``rows`` from ``position`` on are padding of ``lane``."""
        return min(max(self.padding[lane] - position, 0), rows)

    def expect(self, position: int) -> None:
        """A step will bring the session to ``position``: make room for it at once."""
        for lane, skipped in zip(self.lanes, self.padding, strict=True):
            lane.expect(position - skipped)

    def copy_from(
        self, other: "SessionCache", position: int, at_once: int
    ) -> Generator[None, None, None]:
        """Hold what ``other``, with the same padding, holds before ``position``; at the end.

        Yields after about every ``at_once`` bytes. Given up in between, the session holds nothing.
        """
        for lane, source, skipped in zip(self.lanes, other.lanes, self.padding, strict=True):
            yield from lane.copy_from(source, max(0, position - skipped), at_once)
        self.position = position

    def take(self, other: "SessionCache", position: int) -> None:
        """Hold what ``other``, with the same padding, holds before ``position``, in its memory.

        Needs an empty session; leaves ``other`` so.
        """
        for lane, taken in zip(self.lanes, other.lanes, strict=True):
            lane.change_places(taken)
        self.lanes, other.lanes = other.lanes, self.lanes
        self.advance(position)
        self.expect(position)
        other.truncate(0)

    def shrink(self, at_once: int) -> Generator[None, None, None]:
        """Give back memory that holds no tokens, where it is much; yields as ``copy_from`` does."""
        for lane in self.lanes:
            yield from lane.shrink(at_once)

    def reorder(self, order: Sequence[int]) -> None:
        """Let each lane hold what lane ``order[lane]``, with as much padding, held; () changes none.

        Memory changes hands; only what goes on in several lanes is copied, into that of those which
        don't go on. If that fails, the session holds nothing.
        """
        if not order:
            return
        given_up = {lane for lane in range(len(order)) if lane not in order}
        taken: set[int] = set()
        lanes = []
        for source in order:
            lane = source
            if source in taken:
                lane = next(old for old in given_up if self.padding[old] == self.padding[source])
                given_up.remove(lane)
                try:
                    self.lanes[lane].become(self.lanes[source])
                except BaseException:
                    self.truncate(0)
                    raise
            taken.add(lane)
            lanes.append(self.lanes[lane])
        self.lanes = tuple(lanes)

    def truncate(self, position: int) -> None:
        """Forget everything from ``position`` on; the memory stays for what follows."""
        self.advance(min(self.position, position))

    def advance(self, position: int) -> None:
        """All lanes hold the tokens before ``position``; their memory has been written."""
        self.position = position
        for lane, skipped in zip(self.lanes, self.padding, strict=True):
            lane.length = max(0, position - skipped)


class Reservation:
    """A session's part of the budget; freed once, however often ``release`` is called."""

    def __init__(self, pool: "CachePool", tokens: int) -> None:
        self._pool = pool
        self._tokens = tokens

    def release(self) -> None:
        """Give the tokens back."""
        self._pool.used -= self._tokens
        self._tokens = 0


class CachePool:
    """A budget in tokens: one token is one row of KV cache in every block of the node.

    Retained prefixes live in what is ``free``, and give way to every reservation. Not thread-safe; the engine holds its lock around every call.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        """The whole budget."""
        self.used = 0
        """What sessions have reserved."""

    @property
    def free(self) -> int:
        """What no session has reserved."""
        return self.tokens - self.used

    def reserve(self, tokens: int) -> Reservation:
        """Take ``tokens``. Raises CacheFull when they are not there."""
        if tokens > self.tokens:
            raise CacheFull(
                f"the session needs {tokens} tokens of KV cache, but this node has only "
                f"{self.tokens} in all; ask for fewer tokens or a smaller batch",
                retry_after=None,
            )
        if tokens > self.free:
            raise CacheFull(
                f"the session needs {tokens} tokens of KV cache, but only "
                f"{self.free} of {self.tokens} are free now",
                retry_after=_RETRY_AFTER,
            )
        self.used += tokens
        return Reservation(self, tokens)
