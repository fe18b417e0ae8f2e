"""The model families that we know how to take apart, by ``config.model_type``."""

from ...protocol.errors import ModelError
from .bloom import Bloom
from .family import Dimensions, Family

__all__ = ["FAMILIES", "Dimensions", "Family", "find_family"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Bloom(),)}


def find_family(model_type: object) -> Family:
    """The family of a ``model_type``. Raises ModelError with those that are supported."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(
            f"models of type {model_type!r} are not supported; supported are: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return family
