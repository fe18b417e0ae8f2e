"""A transformers model without its blocks: what it does around them, done by its own code.

A model's forward pass makes rotary embeddings, scales embeddings, caps logits; every family keeps
that elsewhere. Instead of knowing where, we let the pass run with a ``Tap`` in place of each block.
What a tap is called with is what the block would have been called with; what it gives back is what
the final norm and the head go on with.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...protocol.errors import ModelError
from ..attention import Plan
from ..model import Ends, RunBlock

ATTENTION = "petals"
"""The name under which our attention is registered with transformers."""


class Tap(nn.Module):
    """Stands for a block: keeps what it is called with, gives back what it is told to."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # not as a submodule: its parameters are none of ours
        self.hidden: torch.Tensor | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        """All but the hidden states."""
        self.given: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """Whatever a model asks of its blocks, such as their kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)

    def forward(
        self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any
    ) -> torch.Tensor:
        """As a block's."""
        self.hidden = hidden_states
        self.arguments = arguments, keywords
        return hidden_states if self.given is None else self.given


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The whole model, all of it on the meta device. Raises ModelError."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation=ATTENTION
            )
    # A config that makes no sense ends in whatever its model's constructor runs into.
    except Exception as error:
        raise ModelError(f"config.json makes no {config.model_type} model: {error}") from error
    blocks_of(model)
    model.eval()
    return model


def base_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    base: nn.Module = model.base_model
    return base


def blocks_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of blocks and its name within the base model. Raises ModelError."""
    found = [
        (name, child)
        for name, child in base_of(model).named_children()
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers
    ]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} is not built of one list of blocks, so it cannot be cut"
        )
    return found[0]


def fill_buffers(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    """Put the buffers that no checkpoint holds where they belong, with what they hold at first."""
    for part in module.modules():
        names = part._non_persistent_buffers_set
        for name in names:
            part._buffers[name] = torch.empty_like(part.get_buffer(name), device=device)
        if names:
            model._init_weights(part)


class Starter:
    """``Start`` for a model: runs its forward pass over taps for what the blocks are called with.

    ``limit`` is the number of tokens from which on the model's rotary embedding changes those of
    earlier tokens, which have been computed by then.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, limit: int | None) -> None:
        name, blocks = blocks_of(model)
        base = base_of(model)
        self._taps = [Tap(block) for block in blocks]
        for child, module in base.named_children():
            if isinstance(module, nn.Embedding) or any(True for _ in module.parameters()):
                setattr(base, child, nn.Identity())  # nothing before or behind the blocks
        setattr(base, name, nn.ModuleList(self._taps))
        fill_buffers(model, base, device)
        self._base = base
        self._device = device
        self._limit = limit

    def __call__(self, hidden: torch.Tensor, plan: Plan) -> RunBlock:
        """See ``Start``."""
        positions = plan.positions(self._device)
        if self._limit is not None and int(positions.max()) >= self._limit:
            raise ModelError(
                f"this model is carried for {self._limit} tokens: beyond them, its rotary "
                "embedding changes what has been computed already"
            )
        self._base(inputs_embeds=hidden, position_ids=positions, use_cache=False)
        called = [tap.arguments for tap in self._taps]

        def run(block: int, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            arguments, keywords = called[block]
            output = module(hidden, *arguments, **keywords, plan=plan)
            result: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return result

        return run


class SkeletonEnds(Ends):
    """The model's own forward pass before and behind its blocks."""

    prefix = "model."

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        config = model.config
        super().__init__(config.vocab_size, config.hidden_size)
        name, blocks = blocks_of(model)
        base = base_of(model)
        self._tap = Tap(blocks[0])
        setattr(base, name, nn.ModuleList([self._tap]))
        fill_buffers(model, model, device)
        self.model = model

    def parts(self) -> Mapping[str, Callable[[torch.Tensor], torch.Tensor]]:
        """See ``Ends``; what else the model has in front and behind has no name of its own here."""
        embeddings: nn.Module = self.model.get_input_embeddings()
        head: nn.Module = self.model.get_output_embeddings()
        return {"word_embeddings": embeddings, "ln_f": self._final_norm, "lm_head": head}

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        base_of(self.model)(input_ids=token_ids, use_cache=False)
        assert self._tap.hidden is not None
        return self._tap.hidden

    def _enter(self, embeddings: torch.Tensor) -> torch.Tensor:
        base_of(self.model)(inputs_embeds=embeddings, use_cache=False)
        assert self._tap.hidden is not None
        return self._tap.hidden

    def _final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        self._tap.given = hidden
        normed: torch.Tensor = base_of(self.model)(
            inputs_embeds=hidden, use_cache=False
        ).last_hidden_state
        self._tap.given = None
        return normed

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self._tap.given = hidden
        logits: torch.Tensor = self.model(inputs_embeds=hidden, use_cache=False).logits
        self._tap.given = None
        return logits
