"""Whether a model comes out right when it is cut and batched: tried before it is served.

A generic family takes models apart by the conventions of transformers, and nothing says that a
model keeps to them: one that drops an argument on the way to attention, or that treats positions in
a way of its own, would give wrong tokens. So a tiny random model with the same switches as the one
asked for (``families/shrink.py``) is saved, loaded as any checkpoint is, cut into two spans, and
runs two texts of different lengths in one batch, in chunks; its logits must be those of ``generate``
at every token. That takes a second or two; what has passed is remembered, by all that it depends on.
"""

import hashlib
import itertools
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from ..protocol.errors import ModelError
from ..protocol.span import Span
from .attention import LaneRows
from .cache import LaneCache
from .families.shrink import VOCABULARY, shrink
from .progress import Progress, Step

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_PROMPTS = (13, 4)
"""Tokens; the first is longer than the tiny model's windows."""
_CHUNK = 6
_NEW_TOKENS = 6
_TOLERANCE = 1e-3
"""Of the largest logit. Sums in another order differ by a thousandth of that; a mistake by all."""
_MOST_PARAMETERS = 200_000_000
"""A model that is not small yet has sizes in fields that we don't know; it is not tried."""


def require_exact(
    name: str,
    config: PreTrainedConfig,
    open_folder: "Callable[[Path], Checkpoint]",
    progress: Progress | None,
) -> None:
    """Raise ModelError, in words, if the model ``name`` of ``config`` would not come out right."""
    try:
        tiny = shrink(config.to_dict())
        passed = platformdirs.user_cache_path("petals-node") / "self-tests" / _key(tiny)
        if passed.exists():
            return
        if progress is not None:
            progress(Step(f"trying a tiny {config.model_type} model against transformers"))
        _try(type(config).from_dict(tiny), open_folder)
    # Code that was not written for us is run in ways that it was not written for.
    except Exception as error:
        raise ModelError(
            f"{name}: models of type {config.model_type} cannot be cut into blocks here: {error}"
        ) from error
    try:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
    except OSError as error:
        logger.warning("%s cannot be written: %s; the model is tried anew next time", passed, error)


def _try(config: PreTrainedConfig, open_folder: "Callable[[Path], Checkpoint]") -> None:
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > _MOST_PARAMETERS:
        raise ModelError("no small model of this kind can be made to try it with")
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _scatter(model)
        prompts = [torch.randint(1, VOCABULARY, (length,)).tolist() for length in _PROMPTS]
        tokens, expected = _generate(model, prompts)
        _save(model, folder)
        given = _run(open_folder(Path(folder)), prompts, tokens)
    error = (given - expected).abs().max() / expected.abs().max()
    if not error < _TOLERANCE:
        raise ModelError(
            "a tiny model of the kind gives other logits in a batch of spans than with "
            f"transformers' generate (an error of {float(error):.1%})"
        )


@torch.no_grad()
def _scatter(model: torch.nn.Module) -> None:
    """Weights of which none is like another: fresh norms and biases would hide a mix-up."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() == 1:
            parameter.add_(noise, alpha=0.1)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def _generate(model: Any, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[batch, new]`` and their logits ``[batch, new, vocab]``, padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in prompts])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return output.sequences[:, length:], torch.stack(output.logits, dim=1).float()


def _save(model: Any, folder: str) -> None:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _run(
    checkpoint: "Checkpoint", prompts: Sequence[list[int]], tokens: torch.Tensor
) -> torch.Tensor:
    """Logits ``[batch, new, vocab]`` of ``tokens`` behind ``prompts``, as hops compute them."""
    cut = checkpoint.num_blocks // 2
    spans = [Span(0, cut), Span(cut, checkpoint.num_blocks)] if cut else [Span(0, 1)]
    hops = [checkpoint.load_blocks(span, torch.float32, "cpu") for span in spans]
    ends = checkpoint.load_ends(torch.float32, "cpu")
    lanes = [LaneCache(hops[0].cache_shape, 64) for _ in prompts]

    def step(pieces: Sequence[tuple[LaneCache, Sequence[int]]]) -> list[torch.Tensor]:
        """The logits behind the last token of each piece; all run in one batch."""
        rows = [LaneRows(lane, len(ids)) for lane, ids in pieces]
        together = list(itertools.chain.from_iterable(ids for _, ids in pieces))
        hidden = ends.embed(torch.tensor([together]))
        for blocks in hops:
            hidden = blocks.run(hidden, blocks.plan(rows))
        for lane, ids in pieces:
            lane.length += len(ids)
        return [own[-1] for own in ends.logits(hidden)[0].split([len(ids) for _, ids in pieces])]

    long, short = prompts
    step([(lanes[0], long[:_CHUNK])])
    given = [step([(lanes[0], long[_CHUNK:]), (lanes[1], short)])]
    given += [
        step([(lane, [token]) for lane, token in zip(lanes, row, strict=True)])
        for row in tokens[:, :-1].t().tolist()
    ]
    return torch.stack([torch.stack(own) for own in given], dim=1)


def _key(tiny: dict[str, Any]) -> str:
    """Whatever the outcome depends on."""
    digest = hashlib.sha256(json.dumps(tiny, sort_keys=True, default=str).encode())
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".c"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
