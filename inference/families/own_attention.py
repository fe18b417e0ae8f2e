"""What the families with attention code of their own have in common: how their models are laid out."""

import re
from typing import Any

from .conversion import Conversion


class OwnAttention:
    """Blocks are ``transformer.h``, and the head may be the word embeddings' twin."""

    tried = False

    def canonical(self, key: str) -> str:
        """See ``Family``."""
        return re.sub(r"^(transformer|model)\.", "", key)

    def conversion(self) -> Conversion:
        """See ``Family``."""
        return Conversion()

    def block_prefix(self, _config: Any, block: int) -> str:
        """See ``Family``."""
        return f"h.{block}."

    def tied(self, config: Any) -> dict[str, str]:
        """See ``Family``."""
        if config.tie_word_embeddings:
            return {"lm_head.weight": "word_embeddings.weight"}
        return {}
