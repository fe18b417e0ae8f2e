"""Sessions that may come: who has asked what this node carries, and is about to open one.

Originators that ask in the same moment would all hear of the same idle node. So whoever asks is
expected for a moment, with the blocks that the session would run, and those who ask next are told.
Most of those who decide for another node never say so: what is expected is forgotten soon.

Time is an argument.
"""

from collections import deque

EXPECTED_BLOCKS = "expected_blocks"
"""The figure of a description that tells of it, the asker's own not included."""
EXPECT_SECONDS = 3.0
"""From the question to the session: two round trips and a little thought."""
MAX_EXPECTED = 1024
"""Of any number of strangers; as many as there may be sessions."""


class Expected:
    """What may come to this node in the next seconds."""

    def __init__(self) -> None:
        self._askers: deque[tuple[float, str, int]] = deque(maxlen=MAX_EXPECTED)

    def __repr__(self) -> str:
        return f"<Expected: {len(self._askers)} sessions at most>"

    def blocks(self, now: float) -> int:
        """How many blocks the sessions that are expected at ``now`` would run."""
        while self._askers and self._askers[0][0] <= now:
            self._askers.popleft()
        return sum(blocks for _, _, blocks in self._askers)

    def asked(self, peer_id: str, blocks: int, now: float) -> None:
        """A peer asks, and may open a session that runs so many blocks here."""
        self._askers.append((now + EXPECT_SECONDS, peer_id, blocks))

    def came(self, peer_id: str) -> None:
        """A peer that had asked, or another one, has come with a session."""
        for asker in self._askers:
            if asker[1] == peer_id:
                self._askers.remove(asker)
                return
