"""The rows of one session that others may begin with: its KV cache and its outputs so far.

The outputs are proportional to the tokens (for ten blocks of BLOOM-176B a twentieth of the KV
cache), so whoever bounds the tokens bounds both.
"""

from collections.abc import Generator

from ..protocol.log import OutputLog
from ..protocol.span import Span
from ..protocol.tensor import DType, WireTensor
from .cache import SessionCache

_SLICE_BYTES = 32 * 2**20
"""Of keys and values copied without a break: 10 to 30 ms, about as long as a short round."""


class PrefixRows:
    """A session of batch 1 without padding, while it lives and when it is retained.

    Only torch's thread may call this. Rows are those of ``span``, with outputs in ``wire_dtype``.
    """

    def __init__(self, cache: SessionCache, hidden_size: int) -> None:
        self._cache = cache
        self._hidden_size = hidden_size
        self._outputs: OutputLog | None = None
        self._steps = 0
        self._restoring = False
        self._cuts = 0
        self.span: Span | None = None
        """Set with the first rows."""
        self.wire_dtype: DType | None = None
        """Set with the first rows."""

    @property
    def length(self) -> int:
        """Rows whose outputs are here."""
        return 0 if self._outputs is None else self._outputs.end

    @property
    def fresh(self) -> bool:
        """Whether the session has had no step, and no rows of others: it may begin with some."""
        return not self._steps and not self._restoring

    def append(self, position: int, outputs: WireTensor, span: Span) -> bool:
        """Add the outputs ``[1, rows, hidden]`` of a step at ``position``; the bytes are kept.

        False, and nothing is here any more, if they don't go on what is here: a session that
        changes its dtype has no prefix until it begins again at 0.
        """
        if position == 0:
            self._outputs = OutputLog(1, self._hidden_size, outputs.dtype)
            self.span, self.wire_dtype = span, outputs.dtype
        if self._outputs is None or position != self.length or outputs.dtype is not self.wire_dtype:
            self._outputs = None
            return False
        self._outputs.append(outputs)
        return True

    def begin_step(self, position: int) -> None:
        """A step at ``position`` begins: drop the outputs from there on."""
        self._steps += 1
        if self._outputs is not None and position < self._outputs.end:
            self._outputs.truncate(position)
            self._cuts += 1

    def take_from(
        self, source: "PrefixRows", length: int
    ) -> Generator[None, None, WireTensor | None]:
        """Copy the first ``length`` rows of ``source``; gives their outputs [1, length, hidden].

        Needs that many rows there, and a ``fresh`` session here. Yields between pieces of the work,
        so that rounds can run. None, and nothing is copied, if this session begins a step, or
        ``source`` is cut meanwhile.
        """
        assert self.fresh and source._outputs is not None and source.span is not None
        self._restoring = True
        span, cuts = source.span, source._cuts
        outputs = source._outputs.read(0, length)
        for _ in self._cache.copy_from(source._cache, length, _SLICE_BYTES):
            yield
            if (self._steps, source._cuts) != (0, cuts):
                return None
        self.append(0, outputs, span)
        return outputs

    def take_over(self, source: "PrefixRows", length: int) -> WireTensor:
        """Hold the first ``length`` rows of ``source``, in its memory: nothing is left there.

        Gives their outputs [1, length, hidden]. Needs that many rows there, of a session that has
        ended, and a ``fresh`` session here.
        """
        assert self.fresh and source._outputs is not None
        self._restoring = True
        source._cuts += 1
        self._cache.take(source._cache, length)
        self._outputs, source._outputs = source._outputs, None
        self._outputs.truncate(length)
        self.span, self.wire_dtype = source.span, source.wire_dtype
        return self._outputs.read(0, length)

    def keep(self, length: int) -> Generator[None, None, None]:
        """The session has ended: drop all but the first ``length`` rows, and their memory.

        Yields between pieces of the work.
        """
        if self._outputs is not None:
            self._outputs.truncate(length)
        self._cache.truncate(length)
        yield from self._cache.shrink(_SLICE_BYTES)
