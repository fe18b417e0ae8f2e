"""Models in a swarm, shaped as transformers' own: their two ends here, their blocks wherever they are.

They have no weights to look at and give no gradients. ``generate`` is transformers' own, over a session
in place of its KV cache; everything that it can do with a model and a cache, it can do here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ...protocol.errors import ConfigError
from .config import AutoDistributedConfig, with_options
from .sequential import RemoteSequential
from .session import UNKNOWN, InferenceSession, RemoteCache
from .swarm_model import SwarmModel, refuse_gradients, ungraded


@dataclass(frozen=True, slots=True)
class Rows:
    """What comes out of the blocks."""

    hidden: torch.Tensor
    """[batch, rows, hidden_size]."""
    cache: RemoteCache | None = None
    """Of the session that they went into, if it goes on."""
    states: tuple[torch.Tensor, ...] | None = None
    """In front of every block and behind the last one, if they are wanted."""


class EndModule(nn.Module):
    """A part of the model's ends, run where torch runs in this process."""

    def __init__(self, swarm: SwarmModel, part: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._swarm = swarm
        self._parts = (part,)  # not as a submodule: its weights may be in any format

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the part makes of ``inputs``."""
        refuse_gradients(inputs)
        ends = self._swarm.originator.ends
        given = inputs.detach().to(device=ends.device)
        if given.is_floating_point():
            given = given.to(ends.dtype)

        def run() -> torch.Tensor:
            with torch.no_grad():
                return self._parts[0](given)

        return self._swarm.compute(run)


class DistributedPreTrainedModel(PreTrainedModel):
    """What the classes below share."""

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    @classmethod
    def from_pretrained(  # type: ignore[override]  # of transformers' arguments, those that mean something
        cls,
        name_or_path: str,
        *,
        config: PreTrainedConfig | None = None,
        initial_peers: Sequence[str] | None = None,
        **options: Any,
    ) -> "DistributedPreTrainedModel":
        """Join the swarm through ``initial_peers`` (None: those in ``PETALS_BOOTSTRAP``).

        ``name_or_path`` is ``demo``, a folder, or a hub id. ``config`` is one of
        ``AutoDistributedConfig``; ``options`` are its options. Raises ConfigError, ModelError, PeerError.
        """
        if config is None:
            config = AutoDistributedConfig.from_pretrained(
                name_or_path, initial_peers=initial_peers, **options
            )
        else:
            if initial_peers is not None:
                options["initial_peers"] = initial_peers
            config = with_options(config, name_or_path, **options)
        return cls(config)

    @property
    def swarm(self) -> SwarmModel:
        """The model's place in the swarm."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the ends are."""
        return self.swarm.originator.ends.device

    @property
    def dtype(self) -> torch.dtype:
        """What the ends compute in."""
        return self.swarm.originator.ends.dtype

    def inference_session(self, *, max_length: int) -> InferenceSession:
        """A session with room for ``max_length`` positions; in its ``with`` block, calls go on in it."""
        raise NotImplementedError

    @property
    def tokenizer_path(self) -> str:
        """What ``AutoTokenizer.from_pretrained`` finds the tokenizer under, of ``demo`` as well."""
        return self.swarm.originator.checkpoint.location

    def close(self) -> None:
        """Leave the swarm, which happens anyway when the model is not used any more."""
        self.swarm.close()


class AutoDistributedModel(DistributedPreTrainedModel):
    """Embeddings, the blocks (``h``), and the final norm; each module of the ends by its own name."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.h = RemoteSequential(config)
        for name, part in self.swarm.originator.ends.parts().items():
            setattr(self, name, EndModule(self.swarm, part))

    @property
    def swarm(self) -> SwarmModel:
        """See the base."""
        return self.h.swarm

    def inference_session(self, *, max_length: int) -> InferenceSession:
        """See the base."""
        return self.h.inference_session(max_length=max_length)

    def get_input_embeddings(self) -> nn.Module:
        """Token ids to what ``inputs_embeds`` would be."""
        return self.get_submodule("word_embeddings")

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001 - transformers' own
        output_hidden_states: bool | None = None,  # noqa: FBT001
        output_attentions: bool | None = None,  # noqa: FBT001
        return_dict: bool | None = None,  # noqa: FBT001
    ) -> Any:
        """Token ids or embeddings in; hidden states behind the final norm out.

        It goes on in the session of ``past_key_values``, or in the active one, if there is one.
        """
        rows = self.run_blocks(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        final = ungraded(self.compute_norm(rows.hidden))
        output = BaseModelOutputWithPast(
            last_hidden_state=final,
            past_key_values=rows.cache,
            hidden_states=with_last(rows.states, final),
        )
        return output if return_dict is not False else output.to_tuple()

    def compute_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head is given."""
        ends = self.swarm.originator.ends
        return self.swarm.compute(lambda: ends.final_norm(hidden)).clone()

    def run_blocks(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: RemoteCache | None,
        inputs_embeds: torch.Tensor | None,
        *,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
    ) -> Rows:
        """As ``forward``, up to what comes out of the last block."""
        if output_attentions:
            raise ConfigError("output_attentions: attention weights do not leave the hops")
        refuse_gradients(inputs_embeds)
        embeddings, token_ids = self._embed(input_ids, inputs_embeds)
        rows = embeddings.shape[1]
        cache = None if use_cache is False else past_key_values
        if cache is None and use_cache is not False and (active := self.h.active_session):
            cache = RemoteCache(active)
        if output_hidden_states:
            if cache is not None:
                raise ConfigError(
                    "output_hidden_states: a session gives those behind its last block only; call "
                    "the model outside of it, or step a session of `model.transformer.h[a:b]`"
                )
            return self._block_by_block(embeddings, padding_of(attention_mask, 0, embeddings))
        if cache is None:
            padding = padding_of(attention_mask, 0, embeddings)
            with InferenceSession(self.h, max_length=rows) as alone:
                hidden = alone.advance(embeddings, token_ids=token_ids, padding=padding)
            return Rows(hidden)
        session = cache.session
        padding = padding_of(attention_mask, session.position, embeddings)
        if session.padding and attention_mask is not None and padding != session.padding:
            raise ConfigError(
                f"attention_mask: the session began with left padding {list(session.padding)}, and "
                f"this has {list(padding)}"
            )
        hidden = session.advance(
            embeddings, token_ids=token_ids, order=cache.take_order(), padding=padding
        )
        return Rows(hidden, cache)

    def _embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give either input_ids or inputs_embeds")
        ends = self.swarm.originator.ends
        if inputs_embeds is not None:
            unknown = torch.full(inputs_embeds.shape[:2], UNKNOWN)
            return self.swarm.compute(lambda: ends.enter(inputs_embeds)).clone(), unknown
        assert input_ids is not None
        ids = input_ids.view(-1, input_ids.shape[-1])
        return self.swarm.compute(lambda: ends.embed(ids)).clone(), ids

    def _block_by_block(self, embeddings: torch.Tensor, padding: tuple[int, ...]) -> Rows:
        """In front of every block, and behind the last one."""
        states = [embeddings]
        unknown = torch.full(embeddings.shape[:2], UNKNOWN)
        for block in self.h:
            with InferenceSession(block, max_length=embeddings.shape[1]) as alone:
                states.append(alone.advance(states[-1], token_ids=unknown, padding=padding))
        return Rows(states[-1], states=tuple(states))


class AutoDistributedModelForCausalLM(DistributedPreTrainedModel, GenerationMixin):
    """A model in a swarm with its head: ``forward``, ``generate``, ``inference_session``."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.transformer = AutoDistributedModel(config)
        self.lm_head: nn.Module = self.transformer.lm_head
        saved = self.swarm.originator.checkpoint.generation_config
        if saved is not None:
            self.generation_config = GenerationConfig.from_dict(dict(saved))

    @property
    def swarm(self) -> SwarmModel:
        """See the base."""
        return self.transformer.swarm

    def inference_session(self, *, max_length: int) -> InferenceSession:
        """See the base."""
        return self.transformer.inference_session(max_length=max_length)

    def get_input_embeddings(self) -> nn.Module:
        """See ``AutoDistributedModel``."""
        return self.transformer.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The head, without the final norm."""
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001 - transformers' own
        output_hidden_states: bool | None = None,  # noqa: FBT001
        output_attentions: bool | None = None,  # noqa: FBT001
        return_dict: bool | None = None,  # noqa: FBT001
        logits_to_keep: int | torch.Tensor = 0,
    ) -> Any:
        """Token ids or embeddings in; fp32 logits out. As ``AutoDistributedModel`` otherwise.

        ``labels`` are token ids, -100 where none counts; ``loss`` is the cross entropy. ``logits_to_keep``:
        of the last so many positions alone (0: of all), or of those at these indices.
        """
        rows = self.transformer.run_blocks(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        hidden, ends = rows.hidden, self.swarm.originator.ends
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        wanted = hidden[:, kept]
        logits = ungraded(self.swarm.compute(lambda: ends.logits(wanted)).clone())
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        states = rows.states
        if states is not None:
            states = with_last(states, self.transformer.compute_norm(hidden))
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=rows.cache, hidden_states=states
        )
        return output if return_dict is not False else output.to_tuple()

    def generate(  # type: ignore[override]  # what is transformers' alone is among the options
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        session: InferenceSession | None = None,
        **options: Any,
    ) -> Any:
        """transformers' ``generate``; in ``session``, or the active one, it goes on behind its text.

        Then ``inputs`` are what comes behind it (None: nothing), and what is given back is what is
        new, ``inputs`` included. Without a session, one is opened for this call.
        """
        given = options.pop("input_ids", None)
        inputs = given if inputs is None else inputs
        session = session or self.transformer.h.active_session
        if "past_key_values" in options or options.get("use_cache") is False:
            return self._generate_with(inputs, generation_config, **options)
        if session is None:
            with InferenceSession(self.transformer.h, None) as alone:
                return self._generate(alone, inputs, generation_config, options)
        return self._generate(session, inputs, generation_config, options)

    def _generate(
        self,
        session: InferenceSession,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        options: dict[str, Any],
    ) -> Any:
        before = session.output_ids
        if before is not None:
            inputs, options = self._behind(session, before, inputs, options)
            lanes = inputs.repeat_interleave(
                self._lanes_per_text(generation_config, options), dim=0
            )
            session.align(lanes)
        elif session.position and inputs is not None:
            raise ConfigError(
                "generate: the session has had steps of hidden states, whose text is not known; "
                "go on stepping, or begin another session"
            )
        result = self._generate_with(
            inputs, generation_config, past_key_values=RemoteCache(session), **options
        )
        bare = isinstance(result, torch.Tensor)
        sequences = result if bare else result.sequences
        session.output_ids = sequences
        new = sequences[:, 0 if before is None else before.shape[1] :].clone()
        if bare:
            return new
        result.sequences = new
        return result

    def _generate_with(self, *arguments: Any, **options: Any) -> Any:
        return super().generate(*arguments, **options)  # type: ignore[misc]  # of a narrower self

    def _behind(
        self,
        session: InferenceSession,
        before: torch.Tensor,
        inputs: torch.Tensor | None,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The whole text, and its mask, of what is to come behind ``before``."""
        if options.get("inputs_embeds") is not None:
            raise ConfigError("inputs_embeds: only at the beginning of a session")
        new = before[:, :0] if inputs is None else inputs.to(before.device)
        if new.shape[0] != before.shape[0]:
            raise ConfigError(f"inputs: {new.shape[0]} texts behind {before.shape[0]} of a session")
        text = torch.cat([before, new], dim=1)
        mask = options.get("attention_mask")
        if mask is None or mask.shape != text.shape:
            lanes = len(session.padding) // before.shape[0] or 1
            told = torch.ones_like(before)
            for row, skipped in enumerate(session.padding[::lanes]):
                told[row, :skipped] = 0
            own = torch.ones_like(new) if mask is None else mask.to(before.device)
            mask = torch.cat([told, own], dim=1)
        return text, {**options, "attention_mask": mask}

    def _lanes_per_text(
        self, generation_config: GenerationConfig | None, options: dict[str, Any]
    ) -> int:
        config = generation_config or self.generation_config

        def number(name: str) -> int:
            return int(options.get(name) or getattr(config, name, None) or 1)

        return max(number("num_beams"), number("num_return_sequences"))

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Called by ``generate`` when it knows how long the text may become."""
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, RemoteCache) and cache.session.max_length is None:
            drafts = 0  # which may go beyond the text's end, and are rolled back then
            if generation_mode is GenerationMode.ASSISTED_GENERATION:
                lookup = generation_config.prompt_lookup_num_tokens
                drafts = lookup or generation_config.num_assistant_tokens or 0
            room = self.swarm.originator.checkpoint.max_length
            cache.session.max_length = max(max_cache_length, min(room, max_cache_length + drafts))
        prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]  # likewise
        prepared: bool = prepare(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        return prepared


def padding_of(mask: torch.Tensor | None, position: int, hidden: torch.Tensor) -> tuple[int, ...]:
    """How much left padding each row of a batch has. Raises ConfigError for any other mask."""
    batch, rows = hidden.shape[:2]
    if mask is None:
        return (0,) * batch
    if mask.shape != (batch, position + rows):
        raise ConfigError(
            f"attention_mask: must be [{batch}, {position + rows}], got {list(mask.shape)}"
        )
    seen = mask.long()
    if not torch.equal(seen.cummax(dim=1).values, seen) or not bool(seen[:, -1].all()):
        raise ConfigError("attention_mask: only padding on the left can be left out; pad there")
    return tuple((position + rows - seen.sum(dim=1)).tolist())


def with_last(
    states: tuple[torch.Tensor, ...] | None, final: torch.Tensor
) -> tuple[torch.Tensor, ...] | None:
    """As transformers counts them: the last one is behind the final norm."""
    return None if states is None else (*states[:-1], final)
