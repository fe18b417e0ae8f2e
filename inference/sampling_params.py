"""How to choose the next token, and where a sampler stands: the values only, without torch.

The command line and the node's API need these before (or without) the second that torch takes
to import; ``sampling.py`` acts on them.
"""

import math
from dataclasses import dataclass

from ..protocol.errors import ConfigError

_MIN_TEMPERATURE = 1e-6
_MAX_TEMPERATURE = 1000.0
_MAX_PENALTY = 1000.0
_MAX_SHIFT = 1000.0
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What text to stop at and how to choose each token. Raises ConfigError when out of range."""

    max_new_tokens: int = 128
    """At most this many tokens are generated; at least 1."""
    temperature: float = 0.0
    """0 takes the likeliest token (greedy). Above 0 samples; 1 is the model's own distribution,
    less is safer, more is wilder."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability; 1 is all."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0 is all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the text so far become less likely; 1 is off."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit as often as it is in the text so far, the prompt apart."""
    presence_penalty: float = 0.0
    """Taken once from the logit of every token that is in the text so far, the prompt apart."""
    logprobs: int | None = None
    """With every token, keep its logarithmic probability and those of so many of the likeliest;
    None: keep none. They are the model's own, before penalties, temperature and what follows it."""
    seed: int | None = None
    """The same seed, prompt and settings give the same text; None is different every time."""
    stop: tuple[str, ...] = ()
    """Generation ends before any of these; they are not part of the text."""

    def __post_init__(self) -> None:
        _integer("max_new_tokens", self.max_new_tokens, 1, None)
        _number("temperature", self.temperature)
        if self.temperature != 0 and not _MIN_TEMPERATURE <= self.temperature <= _MAX_TEMPERATURE:
            raise ConfigError(
                f"temperature: must be 0 (greedy) or from {_MIN_TEMPERATURE} to "
                f"{_MAX_TEMPERATURE:g}, got {self.temperature}"
            )
        _number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: must be above 0 and at most 1, got {self.top_p}")
        _integer("top_k", self.top_k, 0, None)
        _number("repetition_penalty", self.repetition_penalty)
        if not 0 < self.repetition_penalty <= _MAX_PENALTY:
            raise ConfigError(
                f"repetition_penalty: must be above 0 and at most {_MAX_PENALTY:g}, "
                f"got {self.repetition_penalty}"
            )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _number(name, value)
            if abs(value) > _MAX_SHIFT:
                raise ConfigError(
                    f"{name}: must be from -{_MAX_SHIFT:g} to {_MAX_SHIFT:g}, got {value}"
                )
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**63 - 1)
        object.__setattr__(self, "stop", _texts("stop", self.stop))

    @property
    def greedy(self) -> bool:
        """Whether every token is the likeliest one."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class SamplerState:
    """Where a sampler stands between two tokens: beside the tokens, all that it goes on from."""

    finished: tuple[bool, ...]
    """Which rows have ended."""
    generator: bytes = b""
    """The random generator's state. Empty: nothing was drawn from it; a greedy sampler never does."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model found the token that was chosen, and others in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their logarithmic probabilities, the likeliest first."""


def _integer(name: str, value: object, least: int, most: int | None) -> None:
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}: must be a whole number, {allowed}, got {value!r}")
    if value < least or (most is not None and value > most):
        raise ConfigError(f"{name}: must be {allowed}, got {value}")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name}: must be a finite number, got {value!r}")


def _texts(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(x, str) and x for x in value):
        raise ConfigError(f"{name}: must be a tuple of non-empty strings, got {value!r}")
    return tuple(value)
