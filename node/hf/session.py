"""A session that a program steps through itself, and that ``generate`` goes on with call by call.

It opens at its hops with the first step, when the size of the batch and its left padding are known.
What went in is remembered as token ids where it came from some: ``align`` rewinds to where a text that
is to be gone on with departs from that, so that nothing is computed twice that still holds.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from transformers import Cache

from ...protocol.errors import ConfigError
from ...protocol.routing import RouteHop
from ..hidden_session import HiddenSession
from ..node_thread import Held

if TYPE_CHECKING:
    from .sequential import Active, RemoteSequential

UNKNOWN = -1
"""The token id of a row that came as hidden states."""


class InferenceSession:
    """Made by ``RemoteSequential.inference_session``. In a ``with`` block it is the active one there."""

    def __init__(self, blocks: "RemoteSequential", max_length: int | None) -> None:
        self.max_length = max_length
        """Positions that it may grow to; set at the latest before the first step."""
        self.output_ids: torch.Tensor | None = None
        """The whole text so far, of ``generate``: [batch, tokens]. The last one has not gone in."""
        self._blocks = blocks
        self._held: Held[HiddenSession] | None = None
        self._padding: tuple[int, ...] = ()
        self._token_ids = torch.empty((0, 0), dtype=torch.long)
        self._closed = False
        self._before: Active | None = None

    @property
    def position(self) -> int:
        """Positions that went in. Setting it to less rolls the session back."""
        return 0 if self._held is None else self._held.value.position

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self.position:
            raise ConfigError(f"position: {position} is not among 0 to {self.position}")
        if self._held is not None:
            self._blocks.swarm.rewind(self._held.value, position)
            self._token_ids = self._token_ids[:, :position]
        if self.output_ids is not None:
            self.output_ids = self.output_ids[:, :position]

    @property
    def padding(self) -> tuple[int, ...]:
        """Per sequence, how many of its first positions are left padding; () before the first step."""
        return self._padding

    @property
    def route(self) -> tuple[RouteHop, ...]:
        """The hops that it runs through now; none before the first step."""
        ring = None if self._held is None else self._held.value.ring
        return () if ring is None else ring.route

    @property
    def recoveries(self) -> int:
        """How often other hops had to be found."""
        ring = None if self._held is None else self._held.value.ring
        return 0 if ring is None else ring.recoveries

    def step(
        self,
        inputs: torch.Tensor,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Hidden states [batch, rows, hidden_size] in; what the blocks make of them. Rows may be 0.

        ``hypo_ids``: before, sequence b becomes what sequence ``hypo_ids[b]`` was.
        """
        if prompts is not None:
            raise ConfigError(
                "prompts: trained prompts are not offered; prepend them to the inputs"
            )
        order = [] if hypo_ids is None else [int(lane) for lane in hypo_ids]
        unknown = torch.full(inputs.shape[:2], UNKNOWN)
        return self.advance(inputs, order=order, token_ids=unknown)

    def advance(
        self,
        hidden: torch.Tensor,
        *,
        token_ids: torch.Tensor,
        order: Sequence[int] = (),
        padding: Sequence[int] = (),
    ) -> torch.Tensor:
        """As ``step``, of rows that came from ``token_ids``; ``padding`` counts for the first step."""
        held = self._open(hidden.shape[0], tuple(padding) or (0,) * hidden.shape[0])
        output = self._blocks.swarm.step(held.value, hidden, order)
        before = self._token_ids[list(order)] if order else self._token_ids
        self._token_ids = torch.cat([before, token_ids.cpu()], dim=1)
        return output

    def align(self, token_ids: torch.Tensor) -> None:
        """Roll back to where ``token_ids`` [batch, tokens] departs from what went in.

        At least the last token is left to go in. For another batch, everything has to go in again.
        """
        if self._held is None:
            return
        if token_ids.shape[0] != self._token_ids.shape[0]:
            self._leave()
            return
        known = min(self.position, token_ids.shape[1] - 1)
        same = (self._token_ids[:, :known] == token_ids[:, :known].cpu()).all(dim=0).long()
        kept, text = int(same.cumprod(0).sum()), self.output_ids
        if kept < self.position:
            self.position = kept
        self.output_ids = text

    def close(self) -> None:
        """Free what the hops hold. Idempotent."""
        self._closed = True
        self._leave()

    def __enter__(self) -> "InferenceSession":
        """The session itself, active from now on."""
        self._before = self._blocks.activate(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it; whichever was active before is so again."""
        assert self._before is not None, "it has been entered"
        self._blocks.deactivate(self._before)
        self.close()

    def _leave(self) -> None:
        held, self._held = self._held, None
        self._padding = ()
        self._token_ids = torch.empty((0, 0), dtype=torch.long)
        if held is not None:
            held.close()

    def _open(self, batch: int, padding: tuple[int, ...]) -> Held[HiddenSession]:
        if self._closed:
            raise ConfigError("the session is closed; open a new one")
        if self._held is not None:
            return self._held
        if self.max_length is None:
            raise ConfigError("max_length: a session needs to know how many positions to reserve")
        self._held = self._blocks.swarm.open(
            self.max_length, span=self._blocks.span, batch=batch, padding=padding
        )
        self._padding = padding
        self._token_ids = torch.empty((batch, 0), dtype=torch.long)
        return self._held


class RemoteCache(Cache):
    """A session where transformers' ``generate`` wants a KV cache."""

    def __init__(self, session: InferenceSession) -> None:
        super().__init__(layers=[])
        self.session = session
        self._order: torch.Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers are alike
        """Positions that are cached."""
        return self.session.position

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """With the next step, sequence b goes on from what ``beam_idx[b]`` was."""
        self._order = beam_idx if self._order is None else self._order[beam_idx]

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back by as many positions; transformers gives the number as a negative one."""
        if tokens_to_remove:
            self.session.position -= abs(tokens_to_remove)

    def take_order(self) -> list[int]:
        """The order for the step that is to come; [] if it changes nothing."""
        order, self._order = self._order, None
        lanes = [] if order is None else order.tolist()
        return [] if lanes == list(range(len(lanes))) else lanes
