"""The LM head for all sessions of an originator: one pass over its weights for all rows that wait.

The head is the largest matrix of the ends (250,880 × hidden for BLOOM), and reading it is what a
token costs its originator. Sessions whose rows wait at the same time share that, as they share a
round at a hop.
"""

from collections import deque

import torch

from .model import Ends

_MAX_ROWS = 64
"""Rows in one pass: 64 MB of logits for BLOOM's vocabulary."""


class HeadRows:
    """Rows of one session that wait for their logits. Made by ``Head.add``."""

    def __init__(self, head: "Head", hidden: torch.Tensor, *, largest_only: bool) -> None:
        self.hidden = hidden
        self.largest_only = largest_only
        self.result: torch.Tensor | None = None
        self._head = head

    def logits(self) -> torch.Tensor:
        """fp32 ``[batch, 1, vocab_size]``; computed now, or already beside those of others."""
        if self.result is None:
            self._head.compute(self)
        assert self.result is not None
        return self.result


class Head:
    """The head of ``ends``. Rows are added by any thread, and computed on torch's."""

    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self._waiting: deque[HeadRows] = deque()

    def add(self, hidden: torch.Tensor, *, largest_only: bool = False) -> HeadRows:
        """Rows ``[batch, 1, hidden_size]`` whose logits will be asked for in a moment.

        ``largest_only`` as in ``Ends.logits``.
        """
        rows = HeadRows(self, hidden, largest_only=largest_only)
        self._waiting.append(rows)
        return rows

    def compute(self, first: HeadRows) -> None:
        """The logits of ``first`` and of what else waits. Raises what ``Ends.logits`` raises."""
        together = [first]
        count = first.hidden.shape[0]
        others: list[HeadRows] = []
        while self._waiting:
            rows = self._waiting.popleft()
            if rows is first or rows.result is not None:
                continue
            alike = rows.hidden.shape[1:] == first.hidden.shape[1:]
            if alike and count + rows.hidden.shape[0] <= _MAX_ROWS:
                together.append(rows)
                count += rows.hidden.shape[0]
            else:
                others.append(rows)
        self._waiting.extend(others)
        hidden = torch.cat([rows.hidden for rows in together])
        largest_only = all(rows.largest_only for rows in together)
        logits = self._ends.logits(hidden, largest_only=largest_only)
        shares = logits.split([len(rows.hidden) for rows in together])
        for rows, own in zip(together, shares, strict=True):
            rows.result = own
