"""The two halves that a model is taken apart into: ``Blocks`` (a span of them) and ``Ends``.

Both know the model only through its family (``families/``). Neither is thread-safe: one thread of
a process runs torch.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..protocol.errors import ConfigError, LocalProtocolError
from ..protocol.span import Span
from .attention import Bias, LaneRows, Plan, Scratch
from .cache import CacheShape
from .linear import Linear
from .screening import ScreenedLinear, screened

RunBlock = Callable[[int, nn.Module, torch.Tensor], torch.Tensor]
"""Runs one block, its number and its module, on ``[1, rows, hidden_size]``."""
Start = Callable[[torch.Tensor, Plan], RunBlock]
"""What runs blocks on one batch: called once with what goes into the first, for what they share."""


class Blocks:
    """The blocks of ``span``, loaded, on one device."""

    def __init__(
        self,
        span: Span,
        modules: Sequence[nn.Module],
        *,
        start: Start,
        dtype: torch.dtype,
        cache_shape: CacheShape,
        hidden_size: int,
        bias: Bias | None,
    ) -> None:
        self.span = span
        self.hidden_size = hidden_size
        self.cache_shape = cache_shape
        self.dtype = dtype
        """Of the hidden states; the weights and the cache may be narrower."""
        self.device = cache_shape.device
        self._modules = tuple(modules)
        self._start = start
        self._bias = bias
        self._scratch = Scratch(self.device)
        self.passes = 0
        """Blocks run so far, each for a whole batch: a sign of life within a long round."""

    def module(self, block: int) -> nn.Module:
        """One block of the span."""
        return self._modules[block - self.span.start]

    def plan(self, lanes: Sequence[LaneRows]) -> Plan:
        """The plan for one batch of the rows of ``lanes``, in this order; good for one ``run``."""
        return Plan(lanes, self._bias, self._scratch)

    @torch.inference_mode()
    def run(self, hidden: torch.Tensor, plan: Plan, span: Span | None = None) -> torch.Tensor:
        """Run ``hidden`` ``[1, rows, hidden_size]`` through ``span`` (default: all blocks).

        Writes the rows' keys and values behind what the plan's lanes hold; their lengths are left
        to the caller. Returns the same shape and dtype.
        """
        span = self.span if span is None else span
        if not self.span.covers(span):
            raise LocalProtocolError(f"blocks {span} were asked for, {self.span} are loaded")
        plan.prepare(range(span.start, span.end))
        run = self._start(hidden, plan)
        for block in range(span.start, span.end):
            hidden = run(block, self.module(block), hidden)
            self.passes += 1
        return hidden


class Ends(nn.Module):
    """What stands before the first block and behind the last: token ids in, logits out.

    A family's subclass says how (``_embed``, ``_enter``, ``_final_norm``, ``_logits``); the checks are
    here.
    """

    prefix = ""
    """What the names of the parameters begin with, before their names in the checkpoint."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.dtype = torch.float32
        """Of hidden states; set when the weights are loaded."""
        self.device = torch.device("cpu")
        """Where the weights are; set when they are loaded."""

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 ``[batch, rows]`` to hidden states ``[batch, rows, hidden_size]`` in ``dtype``.

        Raises ConfigError for a token id that the model doesn't know.
        """
        if token_ids.dim() != 2 or token_ids.numel() == 0:
            raise LocalProtocolError(
                f"token ids must be [batch, rows], got shape {tuple(token_ids.shape)}"
            )
        least, most = (int(bound) for bound in token_ids.aminmax())
        if least < 0 or most >= self.vocab_size:
            raise ConfigError(
                f"token ids: must be from 0 to {self.vocab_size - 1}, "
                f"got {least if least < 0 else most}"
            )
        return self._embed(token_ids.to(self.device))

    def screen(self) -> None:
        """Make the head faster where only its largest output is wanted, if it can be."""
        head = self.parts()["lm_head"]
        for path, module in [*self.named_modules()]:
            if module is head and isinstance(module, Linear):
                self.set_submodule(path, screened(module))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, *, largest_only: bool = False) -> torch.Tensor:
        """Hidden states ``[batch, rows, hidden_size]`` to fp32 ``[batch, rows, vocab_size]``.

        With ``largest_only``, others than the largest of a row may be wrong; they are smaller.
        """
        if hidden.dim() != 3 or hidden.shape[-1] != self.hidden_size:
            raise LocalProtocolError(
                f"hidden states must be [batch, rows, {self.hidden_size}], "
                f"got shape {tuple(hidden.shape)}"
            )
        hidden = hidden.to(device=self.device, dtype=self.dtype)
        head = self.parts()["lm_head"]
        if largest_only and isinstance(head, ScreenedLinear):
            with head.largest_only():
                return self._logits(hidden).float()
        return self._logits(hidden).float()

    def parts(self) -> Mapping[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Its modules by the names that users know; at least word_embeddings, ln_f, lm_head."""
        return dict(self.named_children())

    @torch.inference_mode()
    def enter(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Word embeddings ``[batch, rows, hidden_size]`` to what goes into the first block."""
        return self._enter(embeddings.to(device=self.device, dtype=self.dtype))

    @torch.inference_mode()
    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head is given, for hidden states from behind the last block."""
        return self._final_norm(hidden.to(device=self.device, dtype=self.dtype))

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _enter(self, embeddings: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError
