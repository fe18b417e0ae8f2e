"""Text from tokens as they come, and where a stop string ends it.

A token may be a part of a character, so text comes later than tokens; ``tokenizers``' own
``DecodeStream`` knows when. What could still become a stop string is held back until it is clear.
All pieces together are ``tokenizer.decode(ids, skip_special_tokens=True)``, cut before the stop
string that was completed first.
"""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from ..protocol.errors import ModelError


class Detokenizer:
    """The text of one generated sequence."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stop: Sequence[str] = ()) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError("the tokenizer is not a fast one; a tokenizer.json is needed")
        self._tokenizer = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = ""
        """All text of the stream, whether given out or not."""
        self._given = 0
        """How many characters of it have been given out."""
        self._stops = tuple(stop)
        self.stopped = False
        """Whether a stop string was found; tokens added after it are ignored."""

    @property
    def text(self) -> str:
        """What has been given out so far."""
        return self._decoded[: self._given]

    def add(self, token_id: int) -> str:
        """The text that has become certain with this token; often empty."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        return self._give(self._stream.step(self._tokenizer, token_id) or "", final=False)

    def finish(self) -> str:
        """The rest of the text, once no token follows: unfinished characters, text held back."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._give(whole[len(self._decoded) :], final=True)

    def _give(self, piece: str, *, final: bool) -> str:
        longest = max(map(len, self._stops), default=0)
        searched = max(0, len(self._decoded) - longest + 1)
        self._decoded += piece
        certain = len(self._decoded)
        found = self._first_stop(searched)
        if found is not None:
            self.stopped = True
            certain = found
            self._decoded = self._decoded[:found]
        elif not final:
            certain -= self._held_back()
        piece = self._decoded[self._given : certain]
        self._given = certain
        return piece

    def _first_stop(self, searched: int) -> int | None:
        """Where the stop string begins that is complete first; it ends behind ``searched``."""
        found = [
            (begin + len(stop), begin)
            for stop in self._stops
            if (begin := self._decoded.find(stop, searched)) >= 0
        ]
        return min(found)[1] if found else None

    def _held_back(self) -> int:
        """The length of the longest end of the text that is the beginning of a stop string."""
        for length in range(max(map(len, self._stops), default=1) - 1, 0, -1):
            if any(
                len(stop) > length and self._decoded.endswith(stop[:length]) for stop in self._stops
            ):
                return length
        return 0
