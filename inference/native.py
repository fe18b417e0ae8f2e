"""Our own kernels in C, called on tensors.

Where there is no C compiler with OpenMP, or a processor that they are not written for, there are
none, and the libraries' kernels do the work; a node that lacks them is slower and computes the same.
"""

import ctypes
import functools
import logging
import time
from collections.abc import Sequence
from statistics import quantiles

import numpy as np
import numpy.typing as npt
import torch

from .native_library import NativeError, open_library
from .packed import NATIVE_DTYPES, PackedMatrix
from .packing import Packer

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]

_FEW_STREAMS = 4
"""Until it is known what is fastest here."""
_TRIALS = 61
"""Of each number of streams, before one is chosen."""
_PRODUCTS = (500, 10_000)
"""Of one row by a large matrix, until all are tried again: the first time, when a node has just begun to
compute beside others that load, and at most; twice as many from time to time."""

_void, _size, _int, _float = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_float


_Views = ctypes.c_int64 * 9
"""``struct strided`` three times."""


def lane_memory(keys: torch.Tensor, values: torch.Tensor, key_norms: torch.Tensor) -> list[int]:
    """A row of ``CachedLanes``' memory: keys and values are ``[cache_heads, capacity, head_dim]``.

    ``key_norms`` are the greatest norms of keys, as ``LaneCache.key_norms``; they are kept up.
    """
    return [keys.data_ptr(), values.data_ptr(), key_norms.data_ptr(), keys.shape[1]]


class CachedLanes:
    """What lanes have cached in some blocks, in the order that ``Native.decode_attention`` reads it in.

    Made before a round begins: between two products, what Python does is time in which all threads wait.
    """

    def __init__(
        self,
        memory: Sequence[IntArray],
        lengths: Sequence[int],
        rows: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        """Lane i has ``lengths[i]`` tokens and owns row ``rows[i]`` of the batch.

        ``memory[i]`` is int64 ``[blocks, 4]``, of each block a ``lane_memory``, which whoever calls
        keeps alive; all keys and values are of one ``dtype``.
        """
        self.count = len(memory)
        self.dtype = dtype
        self._table = np.empty((len(memory[0]), self.count, 6), np.int64)  # of struct lane
        for lane, own in enumerate(memory):
            self._table[:, lane, :4] = own
        self._table[:, :, 4] = lengths
        self._table[:, :, 5] = rows
        self._address: int = self._table.ctypes.data
        self._room: list[int] = self._table[:, :, 3].min(axis=0).tolist()

    def set_lengths(self, lengths: Sequence[int]) -> bool:
        """Let the lanes have ``lengths`` tokens; False: there is no room behind as many."""
        if any(length >= room for length, room in zip(lengths, self._room, strict=True)):
            return False
        self._table[:, :, 4] = lengths
        return True

    def address(self, block: int) -> int:
        """Of ``struct lane``, ``count`` times, for a block, counted from the first one."""
        return self._address + block * self._table.strides[0]


class Native:
    """The compiled functions. All tensors are on the CPU; what is not said is float32."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for constant in (library.panel_features, library.block_rows, library.most_streams):
            constant.restype = _size
        self.packer = Packer(library, library.panel_features())
        self._block_rows: int = library.block_rows()
        most: int = library.most_streams()
        self.streams = tuple(sorted({2, _FEW_STREAMS, most}))
        """What ``multiply`` may be given as such."""
        self._streams = _FEW_STREAMS
        self._trials: dict[int, list[float]] = {number: [] for number in self.streams}
        """Seconds a byte of one row's products."""
        self._settled = 0
        """Products until they are tried again."""
        self._settle_for = _PRODUCTS[0]
        self._multiply = library.multiply
        self._multiply.argtypes = [*[_void] * 3, _int, _void, _size]
        self._multiply.argtypes += [_void, _size, _void, _size, _int]
        self._multiply.restype = None
        self._attention = library.decode_attention
        self._attention.argtypes = [*[_void] * 3, *[_size] * 5, *[_float] * 2, _void, _int, _int]
        self._attention.restype = None
        self._pack_wire = library.pack_wire
        self._pack_wire.argtypes = [_void, _int, _size, _size, _void]
        self._pack_wire.restype = None
        self._unpack_wire = library.unpack_wire
        self._unpack_wire.argtypes = [_void, _size, _size, _void]
        self._unpack_wire.restype = None

    def _tried(self, streams: int, seconds: float) -> None:
        """Take a sample; when there are enough, decide.

        How many panels one row should read side by side differs by processor: a Xeon was fastest with
        eight, an EPYC (Zen 5) by a quarter with two, in attention, too. Tried in turns and on what has
        to be computed anyway, noise hits all alike, and nothing has to wait.
        """
        self._trials[streams].append(seconds)
        if all(len(samples) >= _TRIALS for samples in self._trials.values()):
            # Others' use of the memory makes half of the samples long, at times.
            good = {number: quantiles(samples)[0] for number, samples in self._trials.items()}
            self._streams = min(good, key=good.__getitem__)
            self._trials = {number: [] for number in self.streams}
            self._settled = self._settle_for
            self._settle_for = min(2 * self._settle_for, _PRODUCTS[1])
            logger.debug("memory is read in %d streams", self._streams)

    def _chosen(self, streams: int | None) -> int:
        if streams is None:
            return self._streams
        if streams not in self.streams:
            raise ValueError(f"{streams} streams; there may be {self.streams}")
        return streams

    def multiply(
        self,
        x: torch.Tensor,
        weight: PackedMatrix,
        bias: torch.Tensor | None,
        *,
        gelu: bool = False,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        streams: int | None = None,
    ) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, in ``out`` if it is given.

        ``bias`` is ``[weight.padded]``, contiguous. Weights are widened as they are read, and all
        arithmetic is float32. With ``gelu``, GELU's tanh approximation of it; with a ``residual``
        ``[..., out]``, that added to it in the end. ``streams``, one of ``self.streams``, are the
        panels that one row reads side by side; the fastest here, if not given. Raises ValueError
        for what does not fit, or is not float32.

        Between two products all threads wait for what is done here, in caches that weights have
        filled: hence few steps, and few objects.
        """
        leading, inputs, features = x.shape[:-1], weight.inputs, weight.features
        if x.dtype != torch.float32 or x.shape[-1] != inputs:
            raise ValueError(f"{x.dtype} {tuple(x.shape)} by a matrix of {inputs}")
        if not x.is_contiguous():
            x = x.contiguous()
        count = x.numel() // inputs
        shape, whole = (*leading, features), weight.padded == features
        output, output_row = None, weight.padded
        if out is not None:
            if out.dtype != torch.float32 or out.shape != shape:
                raise ValueError(f"{out.dtype} {tuple(out.shape)} has no room for it")
            if whole and (row := _between_rows(out)):
                output, output_row = out, row
        if output is None:
            output = x.new_empty((*leading, weight.padded))
        added, added_row = None, 0
        if residual is not None:
            if residual.dtype != torch.float32 or residual.shape != shape:
                raise ValueError(f"{residual.dtype} {tuple(residual.shape)} is no residual of it")
            if whole and (row := _between_rows(residual)):
                added, added_row = residual, row
        packed = x.new_empty(min(count, self._block_rows) * inputs) if count > 1 else None
        trying = False
        if count == 1 and streams is None and weight.large:
            trying = self._settled == 0
            if trying:
                streams = min(self._trials, key=lambda number: len(self._trials[number]))
            else:
                self._settled -= 1
        begin = time.perf_counter()
        self._multiply(
            weight.described,
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            gelu,
            None if added is None else added.data_ptr(),
            added_row,
            output.data_ptr(),
            output_row,
            None if packed is None else packed.data_ptr(),
            count,
            self._chosen(streams),
        )
        if trying and streams is not None:
            self._tried(streams, (time.perf_counter() - begin) / weight.data.nbytes)
        if not whole:
            output = output[..., :features]
        if residual is not None and added is None:
            output += residual
        return output if out is None or out is output else out.copy_(output)

    def decode_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lanes: CachedLanes,
        block: int,
        *,
        scale: float,
        slopes: torch.Tensor | None,
        window: int | None = None,
        softcap: float | None = None,
        streams: int | None = None,
    ) -> None:
        """For each lane, attend its row to what it has cached in ``block`` of ``lanes`` and to itself.

        ``query`` is ``[1, heads, rows, head_dim]``, ``key`` and ``value`` are ``[1, cache_heads, rows,
        head_dim]``. Behind the tokens that a lane has cached, the new ones are written. Writes the
        lanes' rows of ``output`` ``[rows, heads, head_dim]``. ``slopes`` ``[heads]`` are ALiBi's.
        ``window`` is how many tokens, itself among them, a row sees; ``softcap`` bends scores into
        -softcap to softcap. ``streams`` are as in ``multiply``.
        """
        views = [x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value)]
        self._attend(
            _Views(*[n for x in views for n in (x.data_ptr(), x.stride(1), x.stride(2))]),
            key.shape[1],
            output,
            lanes,
            block,
            scale=scale,
            slopes=slopes,
            window=window,
            softcap=softcap,
            streams=streams,
        )

    def decode_attention_fused(
        self,
        fused: torch.Tensor,
        output: torch.Tensor,
        lanes: CachedLanes,
        block: int,
        *,
        scale: float,
        slopes: torch.Tensor | None,
    ) -> None:
        """``decode_attention`` of contiguous ``[1, rows, heads * 3 * head_dim]``, as BLOOM has them.

        Of each head the query, the key, the value. To make tensors of them takes as long as the rest.
        """
        _, heads, head_dim = output.shape
        begin, head, row = fused.data_ptr(), 3 * head_dim, 3 * heads * head_dim
        part = 4 * head_dim  # bytes
        self._attend(
            _Views(begin, head, row, begin + part, head, row, begin + 2 * part, head, row),
            heads,
            output,
            lanes,
            block,
            scale=scale,
            slopes=slopes,
        )

    def _attend(
        self,
        views: ctypes.Array[ctypes.c_int64],
        cache_heads: int,
        output: torch.Tensor,
        lanes: CachedLanes,
        block: int,
        *,
        scale: float,
        slopes: torch.Tensor | None,
        window: int | None = None,
        softcap: float | None = None,
        streams: int | None = None,
    ) -> None:
        _, heads, head_dim = output.shape
        self._attention(
            views,
            output.data_ptr(),
            lanes.address(block),
            lanes.count,
            heads,
            cache_heads,
            head_dim,
            window or 0,
            scale,
            softcap or 0.0,
            None if slopes is None else slopes.data_ptr(),
            NATIVE_DTYPES[lanes.dtype],
            self._chosen(streams),
        )

    def pack_wire(self, values: torch.Tensor, packed: torch.Tensor) -> None:
        """``values`` ``[rows, width]`` of 32 or 16 bits, into ``packed``, as ``wire_int8.py`` has them."""
        values = values.contiguous()
        dtype = NATIVE_DTYPES[values.dtype]
        self._pack_wire(values.data_ptr(), dtype, *values.shape, packed.data_ptr())

    def unpack_wire(self, packed: torch.Tensor, values: torch.Tensor) -> None:
        """Into the contiguous ``values`` ``[..., width]``."""
        width = values.shape[-1]
        rows = values.numel() // width
        self._unpack_wire(packed.data_ptr(), rows, width, values.data_ptr())


def _between_rows(x: torch.Tensor) -> int:
    """Numbers from one row of ``[..., row]`` to the next; 0 if they do not lie like that."""
    if x.is_contiguous():
        return x.shape[-1]
    return x.stride(0) if x.dim() == 2 and x.stride(1) == 1 else 0


@functools.cache
def native() -> Native | None:
    """The compiled functions, or None where they cannot be had; tried once per process."""
    try:
        return open_native()
    except (NativeError, OSError) as error:
        logger.info("computing with the libraries' kernels, which are slower: %s", error)
        return None


def open_native() -> Native:
    """The compiled functions. Raises NativeError or OSError where they cannot be had."""
    return Native(open_library())
