"""From logits to tokens, token for token as ``transformers.generate`` chooses them.

The processors are transformers' own, in the order in which ``generate`` applies them: repetition
penalty; then, when sampling, temperature, top-k, top-p; then ``argmax`` or ``multinomial``. Frequency
and presence penalty, which transformers lacks, are OpenAI's, and come behind the repetition penalty. With
a seed the tokens equal those of ``torch.manual_seed(seed); model.generate(do_sample=True, …)``.

A sampler that is made from all tokens so far and the ``state`` of another one behind the last of them
goes on as that one would have.
"""

from collections.abc import Sequence

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..protocol.errors import ConfigError, LocalProtocolError, ModelError
from .sampling_params import SamplerState, SamplingParams, TokenLogprobs

__all__ = ["Sampler", "SamplerState", "SamplingParams", "TokenLogprobs"]


class Sampler:
    """Chooses the tokens of one session: a batch of one or more rows of text.

    ``prompt_ids`` is int64 ``[batch, length]``; row b's first ``padding[b]`` tokens are left
    padding, which the repetition penalty ignores (as ``generate`` does when it gets an attention
    mask). A row that has drawn one of ``eos_token_ids`` or was given to ``finish`` gets
    ``pad_token_id`` from then on.

    ``state`` is that of the sampler that chose the last tokens of ``prompt_ids``, those from position
    ``begin`` on (None: ``prompt_ids`` is the prompt and no more). Raises ConfigError when
    its generator is not one of this version of torch.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: torch.Tensor | Sequence[Sequence[int]],
        *,
        padding: Sequence[int] | None = None,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int = 0,
        begin: int | None = None,
        state: SamplerState | None = None,
    ) -> None:
        self._ids = torch.as_tensor(prompt_ids, dtype=torch.int64, device="cpu")
        if self._ids.dim() != 2:
            raise LocalProtocolError(
                f"prompt_ids must be [batch, length], got shape {tuple(self._ids.shape)}"
            )
        batch = self._ids.shape[0]
        ignored = torch.tensor(list(padding) if padding else [0] * batch, dtype=torch.int64)
        if len(ignored) != batch:
            raise LocalProtocolError(f"padding for {len(ignored)} rows, prompt_ids for {batch}")
        self._params = params
        self._processors = _processors(
            params, ignored, self._ids.shape[1] if begin is None else begin
        )
        self.logprobs: tuple[TokenLogprobs, ...] = ()
        """Of each row's token chosen last; empty unless the params ask for them."""
        self._eos = frozenset(eos_token_ids)
        self._pad_token_id = pad_token_id
        finished = state.finished if state is not None else (False,) * batch
        if len(finished) != batch:
            raise LocalProtocolError(f"the state of {len(finished)} rows, prompt_ids for {batch}")
        self._finished = list(finished)
        self._chosen: list[list[int]] = []  # what is not among the ids yet
        self._generator = torch.Generator()
        if state is not None and state.generator:
            _set_state(self._generator, state.generator)
        elif params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def token_ids(self) -> torch.Tensor:
        """Prompt and tokens so far, int64 ``[batch, length]``."""
        if self._chosen:
            self._ids = torch.cat([self._ids, torch.tensor(self._chosen).T], dim=-1)
            self._chosen = []
        return self._ids

    @property
    def finished(self) -> tuple[bool, ...]:
        """Which rows have ended."""
        return tuple(self._finished)

    @property
    def largest_only(self) -> bool:
        """Whether it looks at the largest logit of a row and at no other."""
        params = self._params
        return params.greedy and params.logprobs is None and not self._processors

    def state(self) -> SamplerState:
        """Where it stands. Not while ``sample`` runs on another thread."""
        drawn = b"" if self._params.greedy else self._generator.get_state().numpy().tobytes()
        return SamplerState(self.finished, drawn)

    def finish(self, row: int) -> None:
        """End ``row``, for example because its text has reached a stop string."""
        self._finished[row] = True

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor) -> list[int]:
        """The next token of each row, from fp32 ``logits`` ``[batch, vocab]``.

        Raises ModelError when the logits are NaN: a node computed nonsense.
        """
        if logits.shape[0] != self._ids.shape[0] or logits.dim() != 2:
            raise LocalProtocolError(
                f"logits must be [{self._ids.shape[0]}, vocab], got shape {tuple(logits.shape)}"
            )
        tokens = self._largest(logits) if self.largest_only else self._choose(logits)
        chosen = [
            self._pad_token_id if done else int(token)
            for token, done in zip(tokens.tolist(), self._finished, strict=True)
        ]
        self._chosen.append(chosen)
        self._finished = [
            done or token in self._eos for token, done in zip(chosen, self._finished, strict=True)
        ]
        return chosen

    def _largest(self, logits: torch.Tensor) -> torch.Tensor:
        """Greedy, and nothing else: no need to copy what may be a megabyte."""
        tokens = _argmax(logits)
        _check(logits.gather(1, tokens[:, None]))
        return tokens

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        scores = logits.to(device="cpu", dtype=torch.float32, copy=True)
        _check(scores)
        own = None if self._params.logprobs is None else torch.log_softmax(scores, dim=-1)
        # transformers writes LongTensor where it takes any int64 tensor.
        scores = self._processors(self.token_ids, scores)  # type: ignore[arg-type]
        if self._params.greedy:
            tokens = torch.argmax(scores, dim=-1)
        else:
            probabilities = torch.softmax(scores, dim=-1)
            tokens = torch.multinomial(
                probabilities, num_samples=1, generator=self._generator
            ).squeeze(1)
        if own is not None:
            self.logprobs = _logprobs(own, tokens, self._params.logprobs or 0)
        return tokens


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest of each row, or the first NaN; numpy is seven times as fast as torch."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _check(logits: torch.Tensor) -> None:
    if logits.isnan().any():
        raise ModelError("the logits contain NaN: the model's output cannot be sampled")


def _set_state(generator: torch.Generator, state: bytes) -> None:
    try:
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    except RuntimeError as error:
        raise ConfigError(
            f"the state of the random generator is not one of torch {torch.__version__}: {error}"
        ) from error


def _logprobs(scores: torch.Tensor, tokens: torch.Tensor, top: int) -> tuple[TokenLogprobs, ...]:
    chosen = scores.gather(1, tokens[:, None]).squeeze(1).tolist()
    likeliest = scores.topk(min(top, scores.shape[1]), dim=-1)
    return tuple(
        TokenLogprobs(logprob, tuple(zip(ids, values, strict=True)))
        for logprob, ids, values in zip(
            chosen, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True
        )
    )


class _CountPenalties(LogitsProcessor):
    """OpenAI's: by how often a token is among those from ``begin`` on, and by whether it is."""

    def __init__(self, begin: int, *, frequency: float, presence: float) -> None:
        self._begin = begin
        self._frequency = frequency
        self._presence = presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = input_ids[:, self._begin :]
        counts = torch.zeros_like(scores).scatter_add_(
            1, new, torch.ones_like(new, dtype=scores.dtype)
        )
        return scores - self._frequency * counts - self._presence * (counts > 0)


def _processors(params: SamplingParams, padding: torch.Tensor, begin: int) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(
            RepetitionPenaltyLogitsProcessor(
                float(params.repetition_penalty), prompt_ignore_length=padding
            )
        )
    if params.frequency_penalty or params.presence_penalty:
        processors.append(
            _CountPenalties(
                begin,
                frequency=float(params.frequency_penalty),
                presence=float(params.presence_penalty),
            )
        )
    if params.greedy:
        return processors
    if params.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(TopKLogitsWarper(top_k=params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(top_p=float(params.top_p)))
    return processors
