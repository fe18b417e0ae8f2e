"""A session of the engine and its steps: what is written down of them, nothing that acts."""

from collections import deque
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import torch

from ..protocol.prefix import Label
from ..protocol.span import Span
from ..protocol.tensor import DType, WireTensor
from .cache import Reservation, SessionCache
from .prefix_rows import PrefixRows
from .schedule import Priority, Waiting


@dataclass(slots=True, eq=False)
class EngineSession:
    """What the engine keeps of a session.

    ``cache``, ``span`` and what ``shared`` holds are torch's thread's own; the rest is under the
    engine's lock.
    """

    cache: SessionCache
    reservation: Reservation
    originator: str
    priority: Priority
    shared: PrefixRows | None
    """Set if its rows may be used by others that begin alike."""
    sampled_here: bool
    """Whether its tokens come from torch's thread, too, and go through no other hop."""
    span: Span | None = None
    """Set by the first step; a session's blocks never change."""
    steps: "deque[Step]" = field(default_factory=deque)
    """Waiting, oldest first; what is left of a longer step between its rounds, too."""
    running: bool = False
    """Whether a step is in the round that runs now."""
    closed: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class Step(Waiting):
    """A step, waiting or running; ``owner`` is its session."""

    owner: EngineSession
    position: int
    hidden: WireTensor
    wire_dtype: DType
    keys: tuple[Label, ...]
    order: tuple[int, ...]
    """What becomes of the lanes before it runs; () if nothing does."""
    future: Future[WireTensor] = field(default_factory=Future[WireTensor])
    started: bool = False
    """Whether it has changed its session."""
    input: torch.Tensor | None = None
    """Of a longer step: ``[batch, rows, hidden]`` on the device, from the first round on."""
    output: torch.Tensor | None = None
    """The same shape; filled round by round, 0 where there is padding."""

    @property
    def complete(self) -> bool:
        """Whether all of its rows have been computed."""
        return self.done == self.rows

    def abandon(self) -> None:
        """Its session was closed before it was complete."""
        if not self.future.cancel() and not self.future.done():
            self.future.set_exception(CancelledError("the session was closed"))
