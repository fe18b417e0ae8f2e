"""The model families that we know how to take apart, by ``config.model_type``.

Those with attention code of their own have a file; all others are one (``generic.py``).
"""

from ...protocol.errors import ModelError
from .bloom import Bloom
from .falcon import Falcon
from .family import Dimensions, Family
from .generic import Generic

__all__ = ["FAMILIES", "Dimensions", "Family", "find_family"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Bloom(), Falcon())}
"""Those with a file of their own."""


def find_family(model_type: object) -> Family:
    """The family of a ``model_type``. Raises ModelError where there can be none."""
    if isinstance(model_type, str):
        if model_type in FAMILIES:
            return FAMILIES[model_type]
        if Generic.knows(model_type):
            return Generic(model_type)
    raise ModelError(
        f"models of type {model_type!r} are not supported: transformers has no causal language "
        "model of that type"
    )
