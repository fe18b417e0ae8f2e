"""Filling a module with a checkpoint's weights, in the form that it computes with.

Matrices are read, converted and packed in pieces (``linear.py``), so that at no time more than the
result and one piece is in memory (with experts, one expert). Embeddings stay in their file: a step
needs a few rows of them, and the head often holds the same matrix packed already.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..protocol.errors import ModelError
from .experts import Experts
from .families.conversion import Conversion
from .linear import Linear, pack_linear
from .precision import Precision
from .weights import Canonical, Stored, Weights


class Embedding(nn.Module):
    """A table in a weight file whose rows are read when they are looked up."""

    def __init__(
        self, table: Stored, dtype: torch.dtype, device: torch.device, inner: nn.Embedding | None
    ) -> None:
        """``table`` ``[entries, width]``; ``inner`` is what a family does with its rows."""
        super().__init__()
        self._table = table
        self._dtype = dtype
        self._device = device
        self._inner = inner

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """int64 ``[...]`` to ``[..., width]``. Raises ModelError when the file has gone bad."""
        rows = self._table.gather(indices.reshape(-1).tolist()).to(self._device, self._dtype)
        if self._inner is None:
            return rows.view(*indices.shape, -1)
        # It looks up in a table of just these rows.
        self._inner.weight = nn.Parameter(rows, requires_grad=False)
        places = torch.arange(len(rows), device=self._device).view(indices.shape)
        looked_up: torch.Tensor = self._inner(places)
        return looked_up


def fill_module(
    module: nn.Module,
    weights: Weights,
    conversion: Conversion,
    *,
    model: str,
    canonical: Canonical,
    tied: Mapping[str, str] | None = None,
    precision: Precision,
    device: torch.device,
) -> None:
    """Load ``module``, whose parameters are on the meta device.

    Its linears, embeddings and experts become ours. ``canonical`` names its parameters; one that is
    not in ``weights`` under that name is there as ``conversion`` has it, or ``tied`` to another.
    Raises ModelError for tensors that are missing or of another shape than the config of ``model``
    has it, and when memory runs out.
    """
    try:
        _Filling(module, weights, conversion, model, canonical, tied or {}, precision, device).run()
    except (RuntimeError, MemoryError) as error:  # torch's way to say that memory is full
        raise ModelError(f"{model} cannot be loaded onto {device}: {error}") from error
    module.requires_grad_(False)
    module.eval()


@dataclass(frozen=True, slots=True)
class _Filling:
    module: nn.Module
    weights: Weights
    conversion: Conversion
    model: str
    canonical: Canonical
    tied: Mapping[str, str]
    precision: Precision
    device: torch.device

    def run(self) -> None:
        shapes = {name: value.shape for name, value in self.module.state_dict().items()}
        layers = {
            path: layer
            for path, layer in self.module.named_modules()
            if type(layer) is nn.Linear or isinstance(layer, nn.Embedding) or _is_experts(layer)
        }
        inside = tuple(f"{path}." for path in layers)
        small = {
            self._name(parameter): parameter
            for parameter in shapes
            if not parameter.startswith(inside) or parameter.endswith(".bias")
        }
        state: dict[str, torch.Tensor] = {}
        for name, stored in self.weights.read(small):
            self._check(name, stored, shapes[small[name]])
            empty = torch.empty(stored.shape, dtype=self.precision.hidden, device=self.device)
            state[small[name]] = empty.copy_(stored.whole())
        for path in sorted(layers):
            layer = layers[path]
            if _is_experts(layer):
                made: nn.Module = self._experts(path, layer)
            else:
                parameter = f"{path}.weight"
                stored = self._read(self._name(parameter), shapes[parameter])
                if isinstance(layer, nn.Embedding):
                    inner = None if type(layer) is nn.Embedding else layer
                    made = Embedding(stored, self.precision.hidden, self.device, inner)
                else:
                    bias = state.pop(f"{path}.bias", None)
                    made = self._pack(stored.shape, stored.rows, bias)
            self.module.set_submodule(path, made)
        for path, part in self.module.named_modules():
            for name, buffer in part.named_buffers(recurse=False):
                if f"{path}.{name}".lstrip(".") not in state and not buffer.is_meta:
                    part._buffers[name] = buffer.to(self.device)
        self.module.load_state_dict(state, assign=True, strict=False)

    def _name(self, parameter: str) -> str:
        """What a parameter is called in the weights, or would be."""
        name = self.conversion.find(self.canonical(parameter), self.weights)
        return name if name in self.weights else self.tied.get(name, name)

    def _read(self, name: str, shape: torch.Size) -> Stored:
        ((_, stored),) = self.weights.read([name])
        self._check(name, stored, shape)
        return stored

    def _check(self, name: str, stored: Stored, shape: torch.Size) -> None:
        if stored.shape != shape:
            raise ModelError(
                f"{self.model}: the tensor {name} has shape {tuple(stored.shape)}, "
                f"config.json calls for {tuple(shape)}"
            )

    def _pack(
        self,
        shape: torch.Size,
        rows: Callable[[int, int], torch.Tensor],
        bias: torch.Tensor | None = None,
    ) -> Linear:
        return pack_linear(shape, rows, bias, self.precision.weights, self.device)

    def _experts(self, path: str, layer: nn.Module) -> Experts:
        for flag, wanted in _EXPERTS.items():
            if getattr(layer, flag) is not wanted:
                raise ModelError(f"{self.model}: experts with {flag}={not wanted} are not carried")
        up, down = (
            [
                self._expert(f"{path}.{name}", shape, expert)
                for shape in [layer.get_parameter(name).shape]
                for expert in range(shape[0])
            ]
            for name in ("gate_up_proj", "down_proj")
        )
        return Experts(up, down, layer._apply_gate)  # type: ignore[arg-type]  # a method

    def _expert(self, parameter: str, shape: torch.Size, expert: int) -> Linear:
        name = self.canonical(parameter)
        parts = self.conversion.find_expert(name, expert, self.weights)
        if parts is None:
            matrix = self._read(self._name(parameter), shape).rows(expert, expert + 1)[0]
        else:
            rows, width = shape[1] // len(parts), shape[2]
            matrix = torch.cat(
                [self._read(part, torch.Size((rows, width))).whole() for part in parts]
            )
        return self._pack(matrix.shape, lambda start, stop: matrix[start:stop])


_EXPERTS = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}
"""What transformers says of the layout that ``Experts`` computes."""


def _is_experts(layer: nn.Module) -> bool:
    return all(hasattr(layer, flag) for flag in _EXPERTS)
