"""Our own kernels in C, called on tensors.

Where there is no C compiler with OpenMP, or a processor that they are not written for, there are
none, and the libraries' kernels do the work; a node that lacks them is slower and computes the same.
"""

import ctypes
import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

import torch

from .lanes import CachedLanes, DecodingRows
from .native_library import NativeError, open_library
from .packed import NATIVE_DTYPES, PackedMatrix
from .packing import Packer

logger = logging.getLogger(__name__)

_FEW_STREAMS = 4
"""Until it is known what is fastest here."""
_TRIALS = 61
"""Of each number of streams, before one is chosen."""
_PRODUCTS = (500, 10_000)
"""Of one row by a large matrix, until all are tried again: the first time, when a node has just begun to
compute beside others that load, and at most; twice as many from time to time."""

_void, _size, _int, _float = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_float


@dataclass(frozen=True)
class Highest:
    """What ``Native.find_highest`` finds."""

    outputs: torch.Tensor
    """``[rows, panels]``: the largest that there may be."""
    best: "ctypes.Array[ctypes.c_int32]"
    """``[rows]``: the panel with the largest that there is at least."""


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
        self._multiply_panels = library.multiply_panels_of
        self._multiply_panels.argtypes = [*[_void] * 3, _size, _void, _size, _void, _size]
        self._multiply_panels.restype = None
        self._attention = library.decode_attention
        self._attention.argtypes = [*[_void] * 3, *[_size] * 5, *[_float] * 2, _void, _int, _int]
        self._attention.restype = None
        self._find_highest = library.find_highest
        self._find_highest.argtypes = [_void, *[_size] * 2, *[_void] * 2, _size, *[_void] * 2]
        self._find_highest.restype = _int
        self._find_others = library.find_others
        self._find_others.argtypes = [*[_void] * 2, *[_size] * 2, *[_void] * 3]
        self._find_others.restype = _size
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
        arithmetic is float32; but rows become bfloat16 where ``Packer.has_pairs`` says so. With
        ``gelu``, GELU's tanh approximation of it; with a ``residual`` ``[..., out]``, that added to
        it in the end. ``streams``, one of ``self.streams``, are the panels that one row reads side
        by side; the fastest here, if not given. Raises ValueError for what does not fit, or is not
        float32.

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

    def multiply_panels(
        self,
        x: torch.Tensor,
        parts: object,
        panels: Sequence[int],
        out: torch.Tensor,
    ) -> None:
        """Of ``multiply``, some ``panels`` only: the same bits, at their places in ``out``.

        ``parts`` are ``described``, of floats, and continue one another; ``panels`` count through all of
        them. ``x`` ``[rows, in]`` is contiguous, of few rows; ``out`` is ``[rows, >= padded of all]``.
        """
        rows = len(x)
        packed = x.new_empty(x.shape) if rows > 1 else None
        self._multiply_panels(
            parts,
            x.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            None if packed is None else packed.data_ptr(),
            rows,
            (ctypes.c_int32 * len(panels))(*panels),
            len(panels),
        )

    def find_highest(
        self, x: torch.Tensor, outputs: torch.Tensor, errors: torch.Tensor
    ) -> "Highest | None":
        """How large the largest of each panel of ``outputs`` ``[rows, panels * panel]`` may be.

        Those are of ``x`` ``[rows, in]``, each off by its error of ``errors`` ``[panels * panel]`` times the
        norm of its row at most; an error of -inf is of an output that there is not. None if that cannot be
        told: something is not finite, or a row next to nothing. All are contiguous.
        """
        rows, panels = len(outputs), len(errors) // self.packer.panel
        highest = outputs.new_empty((rows, panels))
        best = (ctypes.c_int32 * rows)()
        found = self._find_highest(
            x.data_ptr(),
            *x.shape,
            outputs.data_ptr(),
            errors.data_ptr(),
            panels,
            highest.data_ptr(),
            best,
        )
        return Highest(highest, best) if found else None

    def find_others(
        self, outputs: torch.Tensor, errors: torch.Tensor, highest: "Highest"
    ) -> list[int]:
        """The panels that may have an output as large as the largest of a row's best one, ascending.

        For that, the best ones' of ``outputs`` are exact now.
        """
        rows, panels = highest.outputs.shape
        found = torch.empty(panels, dtype=torch.int32)
        count = self._find_others(
            outputs.data_ptr(),
            errors.data_ptr(),
            rows,
            panels,
            highest.outputs.data_ptr(),
            highest.best,
            found.data_ptr(),
        )
        numbers: list[int] = found[:count].tolist()
        return numbers

    def decode_attention(
        self,
        new: DecodingRows,
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
        """For each lane, attend its ``new`` row to what it has cached in ``block`` of ``lanes`` and to itself.

        Behind the tokens that a lane has cached, the new ones are written. Writes the lanes' rows of
        ``output`` ``[rows, heads, head_dim]``. ``slopes`` ``[heads]`` are ALiBi's. ``window`` is how
        many tokens, itself among them, a row sees; ``softcap`` bends scores into -softcap to softcap.
        ``streams`` are as in ``multiply``.
        """
        _, heads, head_dim = output.shape
        self._attention(
            new.views,
            output.data_ptr(),
            lanes.address(block),
            lanes.count,
            heads,
            new.cache_heads,
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


def native_at_hand() -> Native | None:
    """``native()``, if that has been asked for before: where nobody can wait for a compiler."""
    return native() if native.cache_info().currsize else None


def open_native() -> Native:
    """The compiled functions. Raises NativeError or OSError where they cannot be had."""
    return Native(open_library())
