"""Models on the disk, and what transformers alone makes of them in this process."""

import dataclasses
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import petals.inference
import torch
from petals.inference.sampling_params import SamplingParams
from support.tiny_bloom import tiny_bloom
from support.tiny_families import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

DEMO_FOLDER = Path(petals.inference.__file__).parent / "demo_model"


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceModel:
    """A model as users of transformers have it, in fp32."""

    name: str
    """What the command line's ``--model`` is given."""
    folder: Path
    _known: dict[object, list[list[int]]] = dataclasses.field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer."""
        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    @cached_property
    def model(self) -> Any:
        """transformers' model."""
        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, local_files_only=True
        )

    @property
    def num_blocks(self) -> int:
        """How many blocks it has."""
        return int(self.model.config.num_hidden_layers)

    @property
    def max_length(self) -> int:
        """Tokens that it was made for."""
        config = self.model.config
        return int(getattr(config, "seq_length", getattr(config, "max_position_embeddings", 2048)))

    def generate(self, prompts: tuple[str, ...], params: SamplingParams) -> list[list[int]]:
        """The new tokens of each prompt, up to and with the end of text; kept for the next call."""
        if (prompts, params) not in self._known:
            batch = self.tokenizer(list(prompts), return_tensors="pt", padding=True)
            self._known[prompts, params] = self._continue(
                batch["input_ids"], batch["attention_mask"], params
            )
        return self._known[prompts, params]

    def generate_from(self, token_ids: list[int], params: SamplingParams) -> list[int]:
        """The new tokens behind some token ids."""
        ids = torch.tensor([token_ids])
        return self._continue(ids, torch.ones_like(ids), params)[0]

    def _continue(
        self, ids: torch.Tensor, mask: torch.Tensor, params: SamplingParams
    ) -> list[list[int]]:
        options: dict[str, Any] = {"do_sample": not params.greedy}
        if not params.greedy:
            options |= {
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
            }
        if params.seed is not None:
            torch.manual_seed(params.seed)
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=params.max_new_tokens,
                repetition_penalty=params.repetition_penalty,
                pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )
        return [self._ended(row[ids.shape[1] :].tolist()) for row in output]

    def _ended(self, token_ids: list[int]) -> list[int]:
        """Without the padding behind an end of text."""
        end = self.model.generation_config.eos_token_id
        return token_ids[: token_ids.index(end) + 1] if end in token_ids else token_ids

    def prompt(self, length: int) -> str:
        """A text of exactly ``length`` tokens, not the same word over and over."""
        words = "In the beginning was a word, and 12 others went up to the city by night;"
        text = " ".join(f"{words} ({number})" for number in range(length // 16 + 2))
        while len(text) > 1:
            tokens = len(self.tokenizer(text)["input_ids"])
            if tokens == length:
                return text
            # A token has several characters: far away, several can go at once.
            text = text[: -max(1, (tokens - length) // 2)]
        if length == len(self.tokenizer(text)["input_ids"]):
            return text
        raise AssertionError(f"no text of {length} tokens found")


def demo_model() -> ReferenceModel:
    """The model that is built in."""
    return ReferenceModel("demo", DEMO_FOLDER)


def with_demo_tokenizer(folder: Path, config: Callable[[int], PreTrainedConfig]) -> ReferenceModel:
    """A random model of any family, of the ``config`` for a vocabulary of that size."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_FOLDER / name, folder / name)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tiny_model(config(len(tokenizer)), folder)
    return ReferenceModel(str(folder), folder)


def random_model(folder: Path, *, seed: int = 0, **changes: Any) -> ReferenceModel:
    """A random BLOOM that differs from the demo in everything, with the demo's tokenizer.

    Its texts end at no end of text, so they are as long as one asks for.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_FOLDER / name, folder / name)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 80,
        "n_layer": 8,
        "n_head": 5,
        "seq_length": 700,
        "tie_word_embeddings": False,
        "apply_residual_connection_post_layernorm": True,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tiny_bloom(seed=seed, **(sizes | changes)).save_pretrained(folder)
    return ReferenceModel(str(folder), folder)
