"""A session whose rows are given: hidden states go in, and those behind its last block come out.

It may run through a part of the model's blocks.

A step may put the sequences of the batch in another order before its rows go behind them: beam search
goes on with some sequences twice, and with others not at all. Rows can be rewound. What went in is kept
here until the session is closed, so that a lost hop can be replaced.
"""

from collections.abc import Sequence

import torch

from ..inference.tensors import to_wire
from ..protocol.chain import SessionTerms
from ..protocol.errors import ConfigError, PetalsError
from ..protocol.log import OutputLog, fits
from ..protocol.tensor import WireTensor
from .ring import Ring


class HiddenSession:
    """Made by ``Originator.open_hidden_session``. One caller at a time."""

    def __init__(self, terms: SessionTerms) -> None:
        self._terms = terms
        self._log = OutputLog(terms.batch, terms.hidden_size, terms.wire_dtype)
        self.ring: Ring | None = None
        """Set while the session is open."""

    @property
    def position(self) -> int:
        """Rows per sequence that went in."""
        return self._log.end

    def rewind(self, position: int) -> None:
        """Forget the rows from ``position`` on."""
        if not 0 <= position <= self.position:
            raise ConfigError(
                f"position: {position} is not among the session's {self.position} rows"
            )
        self._cut(position, self._running())

    async def step(self, hidden: torch.Tensor, order: Sequence[int] = ()) -> torch.Tensor:
        """Send [batch, rows, hidden_size] around; what comes back, of the same shape and dtype.

        Before, sequence b becomes what ``order[b]`` was, which must have as much padding. Raises
        ConfigError for what does not fit the session, NoRoute when nobody serves some blocks: then
        the order is as asked for and the rows are not in the session, and a step can be tried again.
        """
        ring, start, order = self._running(), self.position, tuple(order)
        rows = self._check(hidden, order)
        if order:
            self._log.reorder(order)
            ring.rewind(start, order)
        if rows == 0:
            return hidden.clone()
        wire = to_wire(hidden, self._terms.wire_dtype)
        self._log.append(WireTensor(wire.dtype, wire.shape, bytes(wire.data)))
        try:
            output = await ring.step(rows, want=rows)
        except BaseException:
            self._cut(start, ring)
            raise
        return output.to(hidden.dtype, copy=True)  # of memory that is the caller's

    def read(self, start: int, stop: int) -> WireTensor:
        """The rows of these positions: what is due must be what is here now."""
        return self._log.read(start, stop)

    def _cut(self, position: int, ring: Ring) -> None:
        """Both at once: the ring must never know of rows that are not here."""
        self._log.truncate(position)
        if position < ring.length:
            ring.rewind(position)

    def _check(self, hidden: torch.Tensor, order: tuple[int, ...]) -> int:
        terms = self._terms
        if hidden.dim() != 3 or (hidden.shape[0], hidden.shape[2]) != (
            terms.batch,
            terms.hidden_size,
        ):
            raise ConfigError(
                f"hidden states must be [{terms.batch}, rows, {terms.hidden_size}], "
                f"got shape {list(hidden.shape)}"
            )
        if order and not fits(order, terms.padding):
            raise ConfigError(
                f"order: sequences {list(order)} cannot take the places of a batch with padding "
                f"{list(terms.padding)}"
            )
        rows: int = hidden.shape[1]
        if self.position + rows > terms.max_tokens:
            raise ConfigError(
                f"{self.position + rows} tokens do not fit this session of {terms.max_tokens}; "
                "start a new one with more room"
            )
        return rows

    def _running(self) -> Ring:
        if self.ring is None:
            raise PetalsError("the session is closed; open a new one")
        return self.ring
