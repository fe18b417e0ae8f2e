"""Tensors that a checkpoint names, or lays out, otherwise than transformers' modules do.

transformers renames and merges tensors while it loads them (``conversion_mapping.py`` there), most
of all the experts of a mixture: hundreds of small matrices in the checkpoint, one parameter in the
module. Here its rules are read backwards, from the parameter to the tensors, so that each is found
without looking at any other. Of its operations, stacking experts and joining their rows are known;
a parameter that needs another one is not found, which is a ModelError in words.
"""

from collections.abc import Iterator
from typing import Any, Protocol

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

_REGEX = frozenset("\\$()[]{}+?|")


class Names(Protocol):
    """The tensors that there are."""

    def __contains__(self, name: str, /) -> bool:
        """Whether a tensor is called that."""


class Conversion:
    """The rules for one model."""

    def __init__(self, *names: str) -> None:
        """``names``: the model's type and class, as transformers has them; rules may be of either.

        Without any, checkpoints are as the modules are.
        """
        rules: list[Any] = []
        for name in names:
            rules += get_checkpoint_conversion_mapping(name) or ()
        self._renamings: list[tuple[str, str]] = []
        """What a name has in the module, and in the checkpoint."""
        self._stacked: list[tuple[str, list[str]]] = []
        """What a parameter's name ends with, and those of its experts' matrices: ``*`` is which."""
        for rule in rules:
            sources = [_plain(pattern) for pattern in rule.source_patterns]
            targets = [_plain(pattern) for pattern in rule.target_patterns]
            if _REGEX & set("".join(sources + targets)) or len(targets) != 1:
                continue
            if isinstance(rule, WeightConverter):
                if _stacks(rule, len(sources)):
                    self._stacked.append((targets[0], sources))
            elif len(sources) == 1:
                self._renamings.append((targets[0], sources[0]))

    def find(self, name: str, known: Names) -> str:
        """What the parameter ``name`` is called among ``known``; ``name`` itself if it isn't."""
        return next((other for other in self._renamed(name) if other in known), name)

    def find_expert(self, name: str, expert: int, known: Names) -> list[str] | None:
        """The matrices whose rows, joined, are the ``expert`` of the parameter ``name``.

        None if they are in no tensors of their own.
        """
        for target, sources in self._stacked:
            if name.endswith(target):
                whole = name.removesuffix(target)
                found = [
                    self.find(whole + source.replace("*", str(expert)), known) for source in sources
                ]
                if all(source in known for source in found):
                    return found
        return None

    def _renamed(self, name: str) -> Iterator[str]:
        yield name
        for target, source in self._renamings:
            if target in name:
                yield name.replace(target, source)


def _plain(pattern: str) -> str:
    """A pattern that matches one text only, as that text."""
    return pattern.removeprefix("^").replace(r"\.", ".")


def _stacks(rule: WeightConverter, sources: int) -> bool:
    match rule.operations:
        case [MergeModulelist(dim=0)]:
            return sources == 1
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return True
        case _:
            return False
