"""Random BLOOMs, small enough to see, and what transformers makes of them: the reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BloomConfig, BloomForCausalLM


def tiny_bloom(*, seed: int = 0, **changes: Any) -> BloomForCausalLM:
    """A random BLOOM in fp32 whose greedy text is not one token over and over.

    6 heads by default, which is no power of two, so ALiBi takes its second formula.
    """
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 48,
        "n_layer": 5,
        "n_head": 6,
        "initializer_range": 0.1,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = BloomForCausalLM(BloomConfig(**(sizes | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh biases are 0 and layer norms 1: a mix-up of them would go unseen.
            if name.endswith("bias") or "layernorm" in name or "ln_f" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        # With a tied head and a plain final norm, a random model only repeats its last token.
        model.transformer.ln_f.weight.normal_()
    model.train(mode=False)
    return model


def save_bloom(folder: Path, model: BloomForCausalLM | None = None, **options: Any) -> Path:
    """Save ``model`` (default: ``tiny_bloom()``) in Hugging Face layout."""
    (model or tiny_bloom()).save_pretrained(folder, **options)
    return folder


def reference_tokens(
    model: BloomForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    **options: Any,
) -> list[list[int]]:
    """The new tokens of each prompt by ``generate``; shorter prompts are padded on the left."""
    ids, mask = pad_left(prompts)
    options = {"do_sample": False, "pad_token_id": 0} | options
    with torch.inference_mode():
        output = model.generate(  # type: ignore[misc]  # transformers' own self type
            ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options
        )
    return [row[ids.shape[1] :].tolist() for row in output]


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 ``[batch, length]``."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask
