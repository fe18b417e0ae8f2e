"""Which rows are known by a key, and which of them are kept when their session has ended.

A key stands for "the first ``position`` positions come from exactly these inputs"; who may believe
it is decided elsewhere (``protocol/prefix.py``). A **holder** has such rows: a live session, or
what is **retained** of one that was closed. Retained rows live off what no session has reserved;
the least recently used go first.

Pure: it holds no rows, only holders of any hashable type. Not thread-safe; the engine's lock is
held around every call.
"""

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from ..protocol.prefix import PREFIX_ROWS

H = TypeVar("H", bound=Hashable)


class PrefixStore(Generic[H]):
    """Keys to holders, and the retained ones in the order of their last use."""

    def __init__(self) -> None:
        self._labels: dict[H, dict[int, bytes]] = {}
        """Per holder its keys by position; positions rise."""
        self._holders: dict[bytes, dict[H, None]] = {}
        self._retained: dict[H, int] = {}
        """Tokens of each retained holder, the least recently used first."""
        self.tokens = 0
        """Held by retained holders."""

    def label(self, holder: H, position: int, key: bytes) -> None:
        """The first ``position`` rows of ``holder`` have ``key``; labels above it are removed."""
        self.cut(holder, position - 1)
        self._labels.setdefault(holder, {})[position] = key
        self._holders.setdefault(key, {})[holder] = None

    def cut(self, holder: H, position: int) -> None:
        """Remove the labels of ``holder`` above ``position``: those rows are no longer true."""
        labels = self._labels.get(holder)
        while labels and next(reversed(labels)) > position:
            self._unlink(holder, labels.popitem()[1])
        if labels is not None and not labels:
            del self._labels[holder]

    def labelled(self, holder: H) -> int:
        """Up to which position ``holder`` is labelled; 0 without labels."""
        labels = self._labels.get(holder)
        return next(reversed(labels)) if labels else 0

    def find(self, keys: Sequence[bytes]) -> tuple[H, int] | None:
        """A holder for the longest known of ``keys``, and that key's position.

        ``keys[j - 1]`` is for ``PREFIX_ROWS * j`` positions. A retained holder counts as used.
        """
        for count in range(len(keys), 0, -1):
            key, position = keys[count - 1], PREFIX_ROWS * count
            found = [h for h in self._holders.get(key, ()) if self._labels[h].get(position) == key]
            if not found:
                continue
            holder = next((h for h in found if h in self._retained), found[0])
            if holder in self._retained:
                self._retained[holder] = self._retained.pop(holder)
            return holder, position
        return None

    def retain(self, holder: H, room: int) -> bool:
        """The session of ``holder`` has ended: keep its labelled rows if they fit ``room`` tokens.

        What was used longer ago gives way, and so does what is a prefix of another. False: the
        holder is forgotten, for want of room or of labels, or because others hold all its rows.
        """
        tokens = self.labelled(holder)
        if not 0 < tokens <= room or self._retained_beside(holder, self._labels[holder][tokens]):
            self.forget(holder)
            return False
        for position, key in self._labels[holder].items():
            for other in self._retained_beside(holder, key):
                if self.labelled(other) == position:
                    self.forget(other)
        self.shrink(room - tokens)
        self._retained[holder] = tokens
        self.tokens += tokens
        return True

    def give_up(self, holder: H, position: int) -> bool:
        """Forget ``holder`` if it is retained and has hardly more than ``position`` rows.

        So whoever has found it may have its rows, and needs no copy. What is lost of it is
        ``PREFIX_ROWS`` rows at most, which a session with the same prompt computes anyway: it begins at the last
        boundary before the prompt's end, and the holder may have that at the end.
        """
        if holder not in self._retained or self.labelled(holder) > position + PREFIX_ROWS:
            return False
        self.forget(holder)
        return True

    def shrink(self, room: int) -> None:
        """Forget retained holders, the least recently used first, until they fit ``room``."""
        while self.tokens > room:
            self.forget(next(iter(self._retained)))

    def forget(self, holder: H) -> None:
        """Remove ``holder`` and its labels."""
        self.cut(holder, 0)
        self.tokens -= self._retained.pop(holder, 0)

    def _retained_beside(self, holder: H, key: bytes) -> list[H]:
        """The retained holders of ``key`` other than ``holder``."""
        holders = self._holders.get(key, {})
        return [other for other in holders if other is not holder and other in self._retained]

    def _unlink(self, holder: H, key: bytes) -> None:
        holders = self._holders[key]
        del holders[holder]
        if not holders:
            del self._holders[key]
