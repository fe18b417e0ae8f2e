"""What users would run instead: transformers in memory, and with its weights on the disk."""

from __future__ import annotations

import pathlib
import tempfile
from types import TracebackType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from .timing import timed
from .torch_thread import on_torch_thread


class Transformers:
    """One session of transformers' own model: the loop of its ``generate``, greedily.

    The loop stands here by itself, and not in ``generate``, so that prefill and decoding are timed
    apart and at a known length; what ``generate`` adds to it would only make the rival slower.
    """

    @on_torch_thread
    def __init__(self, folder: pathlib.Path, dtype: torch.dtype, **options: Any) -> None:
        """``options`` are ``from_pretrained``'s."""
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, **options
        )
        self.model.train(mode=False)
        self._cache = DynamicCache(config=self.model.config)
        self._next = torch.zeros((1, 1), dtype=torch.int64)

    @on_torch_thread
    @torch.inference_mode()
    def prefill(self, token_ids: list[int]) -> float:
        """Begin a session with a prompt; the seconds until its first new token."""
        self._cache = DynamicCache(config=self.model.config)
        return timed(lambda: self._step(torch.tensor([token_ids])))

    @on_torch_thread
    @torch.inference_mode()
    def decode(self, tokens: int) -> float:
        """Seconds a token over ``tokens``, which are then forgotten: the session's length stays."""
        seconds = timed(lambda: self._step(self._next), repeats=tokens)
        self._cache.crop(-tokens)
        return seconds

    @on_torch_thread
    @torch.inference_mode()
    def generate(self, token_ids: list[int], tokens: int) -> list[int]:
        """The greedy text behind a prompt, by transformers' ``generate`` itself."""
        prompt = torch.tensor([token_ids])
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=tokens,
        )
        new: list[int] = output[0, len(token_ids) :].tolist()
        return new

    def _step(self, token_ids: torch.Tensor) -> None:
        output = self.model(
            token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._next = output.logits[:, -1].argmax(-1, keepdim=True)


class DiskOffload(Transformers):
    """transformers with accelerate: every block is read from the disk for every token.

    What one does with a model that is larger than the memory. Here the files are in the page
    cache after the first token, which flatters it: a real disk is slower.
    """

    def __init__(self, folder: pathlib.Path, dtype: torch.dtype, num_blocks: int) -> None:
        self._offloaded = tempfile.TemporaryDirectory(prefix="petals-bench-")
        blocks = {f"transformer.h.{block}": "disk" for block in range(num_blocks)}
        ends = ("word_embeddings", "word_embeddings_layernorm", "ln_f")
        super().__init__(
            folder,
            dtype,
            device_map={f"transformer.{end}": "cpu" for end in ends} | {"lm_head": "cpu"} | blocks,
            offload_folder=self._offloaded.name,
        )

    def __enter__(self) -> DiskOffload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._offloaded.cleanup()
