"""``petals-node reference`` (hidden): what transformers alone generates, to compare with.

Rules of this file: nothing of ours takes part in the forward pass, the tokenising or the sampling.
"""

import json
import sys
import time
from typing import Any

from ...inference.hub import FolderSource, open_source
from . import failures, leaving


def reference(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int | None,
    repetition_penalty: float | None,
    exit_with_stdin: bool,
) -> int:
    """Write one line of JSON: the new token ids, their text, and tokens per second."""
    if exit_with_stdin:
        leaving.leave_when_stdin_ends()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = open_source(model, cache_dir=None)
    where = source.folder if isinstance(source, FolderSource) else source.name
    tokenizer = AutoTokenizer.from_pretrained(where)
    network: Any = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    token_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    started = time.monotonic()
    with torch.inference_mode():
        output = network.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty or 1.0,
        )
    seconds = time.monotonic() - started
    new_ids = output[0, token_ids.shape[1] :].tolist()
    record = {
        "text": tokenizer.decode(new_ids, skip_special_tokens=True),
        "token_ids": new_ids,
        "tokens_per_second": len(new_ids) / seconds,
    }
    sys.stdout.write(json.dumps(record) + "\n")
    return failures.OK
