"""One model in one swarm, for synchronous callers: its node in a thread, its ends, its sessions."""

import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedConfig

from ...protocol.errors import ConfigError
from ...protocol.span import Span
from ..hidden_session import HiddenSession
from ..node_thread import Held, NodeThread
from .config import node_config

T = TypeVar("T")

NO_GRADIENTS = (
    "no gradients flow through the swarm: call this under torch.no_grad() or "
    "torch.inference_mode(), or with tensors that do not require grad"
)


class SwarmModel:
    """Joins the swarm when it is made; leaves it on ``close``, or when nobody holds it any more."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._thread = NodeThread(node_config(config))
        self._finalizer = weakref.finalize(self, self._thread.stop)
        self.originator = self._thread.call(lambda node: node.originator())
        """Knows the model's checkpoint and ends."""

    def compute(self, function: Callable[[], T]) -> T:
        """Run ``function`` where torch runs in this process."""
        return self._thread.call(lambda _: self.originator.compute(function))

    def open(
        self, max_length: int, *, span: Span, batch: int, padding: Sequence[int]
    ) -> Held[HiddenSession]:
        """A session, open until it is closed. Raises ConfigError."""
        return self._thread.hold(
            lambda node: node.open_hidden_session(
                max_length, span=span, batch=batch, padding=padding
            )
        )

    def step(
        self, session: HiddenSession, hidden: torch.Tensor, order: Sequence[int]
    ) -> torch.Tensor:
        """``session.step``. Raises ConfigError for hidden states that want gradients."""
        refuse_gradients(hidden)
        return self._thread.call(lambda _: session.step(hidden, order))

    def rewind(self, session: HiddenSession, position: int) -> None:
        """``session.rewind``."""
        self._thread.call_sync(lambda: session.rewind(position))

    def close(self) -> None:
        """Leave the swarm. Idempotent."""
        self._finalizer()


def refuse_gradients(*tensors: torch.Tensor | None) -> None:
    """Raise ConfigError if one of ``tensors`` is to get gradients."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ConfigError(NO_GRADIENTS)


class _Ungraded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> None:  # noqa: ARG004
        raise ConfigError(NO_GRADIENTS)


def ungraded(value: torch.Tensor) -> torch.Tensor:
    """``value`` for the caller; where gradients are recorded, asking it for them raises ConfigError."""
    if not torch.is_grad_enabled():
        return value
    anchor = torch.zeros((), requires_grad=True)
    result: torch.Tensor = _Ungraded.apply(value, anchor)  # type: ignore[no-untyped-call]
    return result
