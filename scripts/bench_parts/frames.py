"""``scripts/bench frames``: tensors into frames and back, against copying them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import msgpack
import numpy
import torch
from petals.inference.native import native
from petals.inference.tensors import to_torch, to_wire
from petals.protocol.codec import FrameDecoder, encode, max_rows
from petals.protocol.frames import Step
from petals.protocol.tensor import DType, WireTensor

from .report import Aim, Report, Row, number
from .settings import Settings
from .timing import medians, timed

HIDDEN = 14336
"""BLOOM-176B's: a row of 28 KB in 16 bit."""
ROWS = 2048
"""Of the large tensor: 58 MB in 16 bit."""
STEP_LIMIT = 50e-6
"""Seconds a side for the frame of one decoding step."""
COPIES = 2.0
"""How many copies of a large tensor it may cost to encode and decode it."""
RECEIVED = 65_519
"""Bytes that come at once: a message of the Noise protocol."""
REPEATS = 200


def run(settings: Settings, report: Report, parts: Sequence[str] | None) -> None:
    """One row of hidden states, then many, in every wire dtype."""
    if parts:
        raise SystemExit("--part: frames has none")
    native()  # as a node that has loaded a model
    for dtype in (DType.FLOAT16, DType.FLOAT32, DType.INT8):
        one_step(settings, report, dtype)
    for dtype in (DType.FLOAT16, DType.INT8):
        large_tensor(settings, report, dtype)


def hidden_states(rows: int) -> torch.Tensor:
    """float16 ``[1, rows, hidden]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, rows, HIDDEN), generator=generator).half()


def step(hidden: WireTensor, position: int = 0) -> Step:
    """The frame that carries rows from one hop to the next."""
    return Step(1, position, 0, position, position, hidden)


def one_step(settings: Settings, report: Report, dtype: DType) -> None:
    """A decoding step's frame, each side by itself; from a tensor, and back into one."""
    hidden = hidden_states(1).to(torch.float32 if dtype is DType.FLOAT32 else torch.float16)
    encoded = b"".join(encode(step(to_wire(hidden, dtype))))
    packed = pack_all(hidden, dtype)

    def decode() -> None:
        for frame in FrameDecoder().feed(encoded):
            assert isinstance(frame, Step)
            to_torch(frame.hidden)

    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "encode": (lambda: encode(step(to_wire(hidden, dtype))), lambda: pack_all(hidden, dtype)),
        "decode": (decode, lambda: unpack_all(packed)),
    }
    for side, (ours, rival) in sides.items():
        taken = medians(
            {
                "ours": partial(timed, ours, REPEATS),
                "rival": partial(timed, rival, REPEATS),
            },
            settings.rounds,
        )
        name = f"{dtype} frame of one row, {len(encoded) / 1000:.0f} KB: {side}"
        seconds = taken["ours"]
        limit = Aim(at_most=1.0)
        report.add(Row(name, seconds * 1e6, "µs", "limit: 50", seconds / STEP_LIMIT, limit))
        rival_name = f"msgpack of everything in one object: {number(taken['rival'] * 1e6)}"
        report.add(Row(name, seconds * 1e6, "µs", rival_name, taken["rival"] / seconds))


def large_tensor(settings: Settings, report: Report, dtype: DType) -> None:
    """A long prompt's rows, in frames as a link sends them, against copies of their bytes."""
    hidden = hidden_states(ROWS if settings.large_frames else 64)
    source = hidden.view(-1).view(torch.uint8).numpy()
    target = numpy.empty_like(source)
    wire = [b"".join(buffers) for buffers in encoded_in_frames(hidden, dtype)]
    received = [
        frame[start : start + RECEIVED]
        for frame in wire
        for start in range(0, len(frame), RECEIVED)
    ]
    taken = medians(
        {
            "copy": lambda: timed(lambda: numpy.copyto(target, source)),
            "encode": lambda: timed(lambda: encoded_in_frames(hidden, dtype)),
            "decode": lambda: timed(lambda: decode_all(received)),
            "msgpack": lambda: timed(lambda: unpack_all(pack_all(hidden, dtype))),
        },
        settings.rounds,
    )
    both = taken["encode"] + taken["decode"]
    name = f"{dtype}, {hidden.nbytes / 1e6:.0f} MB in 16 bit: encode and decode"
    report.add(
        Row(
            name,
            both * 1e3,
            "ms",
            f"a copy of the 16-bit tensor: {number(taken['copy'] * 1e3)}",
            both / taken["copy"],
            Aim(at_most=COPIES) if dtype is DType.FLOAT16 else None,
        )
    )
    rival = f"msgpack of everything in one object: {number(taken['msgpack'] * 1e3)}"
    report.add(Row(name, both * 1e3, "ms", rival, taken["msgpack"] / both))
    for side in ("encode", "decode"):
        report.add(Row(f"{name}, {side} alone", taken[side] * 1e3, "ms"))


def encoded_in_frames(hidden: torch.Tensor, dtype: DType) -> list[list[bytes | memoryview]]:
    """The buffers of each frame that carries a part of ``hidden``."""
    wire = to_wire(hidden, dtype)
    rows, width = wire.shape[1], wire.shape[2]
    most, row = max_rows(1, width, dtype), dtype.row_bytes(width)
    data = memoryview(wire.data)
    return [
        encode(
            step(
                WireTensor(
                    dtype,
                    (1, min(most, rows - start), width),
                    data[start * row : (start + most) * row],
                ),
                start,
            )
        )
        for start in range(0, rows, most)
    ]


def decode_all(received: Sequence[bytes]) -> None:
    """What a receiver does with bytes as they come: rows as tensors, frame by frame."""
    decoder = FrameDecoder()
    for data in received:
        for frame in decoder.feed(data):
            assert isinstance(frame, Step)
            to_torch(frame.hidden)


def pack_all(hidden: torch.Tensor, dtype: DType) -> bytes:
    """The obvious way: header and bytes in one msgpack object."""
    wire = to_wire(hidden, dtype)
    packed: bytes = msgpack.packb(
        {"kind": "step", "shape": wire.shape, "dtype": wire.dtype, "data": bytes(wire.data)}
    )
    return packed


def unpack_all(packed: bytes) -> torch.Tensor:
    """``pack_all`` undone."""
    content = msgpack.unpackb(packed, max_bin_len=len(packed))
    wire = WireTensor(DType(content["dtype"]), tuple(content["shape"]), content["data"])
    return to_torch(wire)
