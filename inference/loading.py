"""Filling a module with a checkpoint's weights, in the form that it computes with.

Matrices are read, converted and packed in pieces (``linear.py``), so that at no time more than the
result and one piece is in memory. Embeddings stay in their file: a step needs a few rows of them,
and the head often holds the same matrix packed already.
"""

from collections.abc import Mapping

import torch
from torch import nn

from ..protocol.errors import ModelError
from .linear import pack_linear
from .precision import Precision
from .weights import Stored, Weights


class Embedding(nn.Module):
    """A table in a weight file whose rows are read when they are looked up."""

    def __init__(self, table: Stored, dtype: torch.dtype, device: torch.device) -> None:
        """``table`` ``[entries, width]``."""
        super().__init__()
        self._table = table
        self._dtype = dtype
        self._device = device

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """int64 ``[...]`` to ``[..., width]``. Raises ModelError when the file has gone bad."""
        rows = self._table.gather(indices.reshape(-1).tolist())
        return rows.view(*indices.shape, -1).to(self._device, self._dtype)


def fill_module(
    module: nn.Module,
    weights: Weights,
    *,
    model: str,
    prefix: str = "",
    tied: Mapping[str, str] | None = None,
    precision: Precision,
    device: torch.device,
) -> None:
    """Load ``module``, which is on the meta device: its linears and embeddings become ours.

    Its parameters are called in the checkpoint as here, behind ``prefix``; one that is not there
    may be ``tied`` to another. Raises ModelError for tensors that are missing or of another shape
    than the config of ``model`` has it, and when memory runs out.
    """
    shapes = {prefix + name: value.shape for name, value in module.state_dict().items()}
    sources = {name: name if name in weights else (tied or {}).get(name, name) for name in shapes}
    layers = {
        f"{prefix}{path}.weight": path
        for path, layer in module.named_modules()
        if type(layer) in (nn.Linear, nn.Embedding)
    }
    try:
        state: dict[str, torch.Tensor] = {}
        for name, stored in weights.read(shapes.keys() - layers.keys()):
            _check_shape(model, name, stored, shapes[name])
            empty = torch.empty(stored.shape, dtype=precision.hidden, device=device)
            state[name] = empty.copy_(stored.whole())
        for name in sorted(layers):
            path = layers[name]
            ((_, stored),) = weights.read([sources[name]])
            _check_shape(model, sources[name], stored, shapes[name])
            bias = state.pop(f"{prefix}{path}.bias", None)
            module.set_submodule(path, _layer(module, path, stored, bias, precision, device))
    except (RuntimeError, MemoryError) as error:  # torch's way to say that memory is full
        raise ModelError(f"{model} cannot be loaded onto {device}: {error}") from error
    module.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state.items()}, assign=True
    )
    module.requires_grad_(False)
    module.eval()


def _layer(
    module: nn.Module,
    path: str,
    stored: Stored,
    bias: torch.Tensor | None,
    precision: Precision,
    device: torch.device,
) -> nn.Module:
    if type(module.get_submodule(path)) is nn.Linear:
        return pack_linear(stored.shape, stored.rows, bias, precision.weights, device)
    return Embedding(stored, precision.hidden, device)


def _check_shape(model: str, name: str, stored: Stored, expected: torch.Size) -> None:
    if stored.shape != expected:
        raise ModelError(
            f"{model}: the tensor {name} has shape {tuple(stored.shape)}, "
            f"config.json calls for {tuple(expected)}"
        )
