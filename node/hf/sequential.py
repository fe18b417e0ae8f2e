"""Blocks of a model in the swarm, as a module: ``model.transformer.h``, and slices of it."""

import contextvars
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...protocol.errors import ConfigError
from ...protocol.span import Span
from .session import InferenceSession
from .swarm_model import SwarmModel, refuse_gradients

Active = contextvars.Token[InferenceSession | None]
"""Which session was active before another one."""


class RemoteSequential(nn.Module):
    """Blocks ``start_block … end_block - 1``: hidden states in, hidden states out.

    Called inside a session's ``with`` block, it takes a step of that session.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        start_block: int = 0,
        end_block: int | None = None,
        swarm: SwarmModel | None = None,
    ) -> None:
        """``swarm``: the one that another part of the model has joined; None: join it now."""
        super().__init__()
        self.config = config
        self.swarm = swarm or SwarmModel(config)
        total = self.swarm.originator.checkpoint.num_blocks
        end = total if end_block is None else end_block
        if not 0 <= start_block < end <= total:
            raise ConfigError(f"blocks: {start_block}:{end} are no blocks of 0:{total}")
        self.span = Span(start_block, end)
        self._active: contextvars.ContextVar[InferenceSession | None] = contextvars.ContextVar(
            "active_session", default=None
        )

    def forward(self, inputs: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
        """[batch, rows, hidden_size] to the same. Raises ConfigError when gradients are wanted."""
        refuse_gradients(inputs)
        if (session := self.active_session) is not None:
            return session.step(inputs, prompts)
        with InferenceSession(self, max_length=inputs.shape[1]) as alone:
            return alone.step(inputs, prompts)

    def inference_session(self, *, max_length: int) -> InferenceSession:
        """A session through these blocks; use it as a context manager, or close it."""
        return InferenceSession(self, max_length)

    @property
    def active_session(self) -> InferenceSession | None:
        """The session in whose ``with`` block this thread is."""
        return self._active.get()

    def activate(self, session: InferenceSession) -> Active:
        """Make ``session`` the active one; what it gives is for ``deactivate``."""
        return self._active.set(session)

    def deactivate(self, before: Active) -> None:
        """Make the session active that was so before."""
        self._active.reset(before)

    def __getitem__(self, blocks: int | slice) -> "RemoteSequential":
        """One block, or several that follow one another."""
        if isinstance(blocks, int):
            if not -len(self) <= blocks < len(self):
                raise IndexError(f"block {blocks} of {len(self)}")
            numbers = range(len(self))[blocks % len(self) : blocks % len(self) + 1]
        else:
            numbers = range(len(self))[blocks]
            if numbers.step != 1 or not numbers:
                raise ConfigError(f"blocks: {blocks} does not name blocks that follow one another")
        return RemoteSequential(
            self.config,
            start_block=self.span.start + numbers.start,
            end_block=self.span.start + numbers.stop,
            swarm=self.swarm,
        )

    def __len__(self) -> int:
        return len(self.span)

    def __iter__(self) -> Iterator["RemoteSequential"]:
        """Each block alone."""
        return (self[index] for index in range(len(self)))

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"blocks {self.span}"
