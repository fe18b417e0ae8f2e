"""Our own side in one process: blocks on an engine, and ends beside them where text is wanted."""

from __future__ import annotations

import collections
import pathlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from petals.inference.checkpoint import Checkpoint, open_checkpoint
from petals.inference.device import as_device
from petals.inference.engine import Engine
from petals.inference.model import Blocks, Ends
from petals.inference.tensors import to_torch, to_wire, wire_dtype
from petals.protocol.codec import max_rows
from petals.protocol.prefix import Label
from petals.protocol.span import Span
from petals.protocol.tensor import DType, WireTensor

from .models import ModelSize
from .report import cpu_name
from .timing import timed
from .torch_thread import TORCH, on_torch_thread

T = TypeVar("T")

DEADLINE = 600.0
"""Seconds that a step may take before we give the benchmark up."""
PIECES_ON_THE_WAY = 4
"""Of a long prompt: an engine refuses to queue much of one session."""


@dataclass(frozen=True)
class Mode:
    """How a node holds its weights: what ``--dtype`` and ``--quantization`` say."""

    dtype: str = "auto"
    quantization: str = "none"

    @property
    def name(self) -> str:
        """As it is shown."""
        return self.dtype if self.quantization == "none" else self.quantization


AUTO = Mode()
FLOAT32 = Mode("float32")
FLOAT16 = Mode("float16")
BFLOAT16 = Mode("bfloat16")
INT8 = Mode(quantization="int8")
NF4 = Mode(quantization="nf4")


def modes() -> list[Mode]:
    """The dtypes that are of use on this machine's processor."""
    return [FLOAT32, FLOAT16, *([BFLOAT16] if "bf16" in cpu_name() else [])]


def block_bytes(checkpoint: Checkpoint, mode: Mode) -> int:
    """Bytes of a block's weights, of which every token needs every one."""
    precision = checkpoint.precision(mode.dtype, quantization=mode.quantization)
    return checkpoint.block_bytes(precision, as_device("auto"))


def bits_a_weight(checkpoint: Checkpoint, mode: Mode) -> float:
    """In memory; float32 may be held in less, where that loses nothing."""
    return 8 * block_bytes(checkpoint, mode) / checkpoint.block_parameters()


@on_torch_thread
def mode_label(size: ModelSize, folder: pathlib.Path, mode: Mode) -> str:
    """Model and precision in words."""
    checkpoint = open_checkpoint(folder)
    precision, automatic = (
        checkpoint.precision(one.dtype, quantization=one.quantization) for one in (mode, AUTO)
    )
    remarks = []
    bits = round(bits_a_weight(checkpoint, mode))
    if not precision.weights.quantized and bits < 8 * precision.weights.torch_dtype.itemsize:
        remarks.append(f"held in {bits} bit")
    if precision == automatic:
        remarks.append("auto")
    return f"{size.name} {precision.name}" + (f" ({', '.join(remarks)})" if remarks else "")


def name_of(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


class Local:
    """A node in one process, without a network: an engine, and perhaps the model's ends."""

    def __init__(
        self,
        folder: pathlib.Path | str,
        mode: Mode,
        *,
        span: Span | None = None,
        ends: bool = False,
        cache_tokens: int = 40_000,
        wire: DType | None = None,
    ) -> None:
        """``span``: None is the whole model. ``wire``: see ``wire_dtype``."""
        self.folder = pathlib.Path(folder)
        self.checkpoint = open_checkpoint(folder)
        self.span = span or Span(0, self.checkpoint.num_blocks)
        self.mode = mode
        self.blocks, self._ends = self._load(ends=ends)
        self.engine = Engine(self.blocks, cache_tokens=cache_tokens, thread=TORCH)
        self.wire_dtype = wire or wire_dtype(self.blocks.dtype)
        """In which hidden states go in and out; as they are computed unless told otherwise."""
        self._opened = 0

    @on_torch_thread
    def _load(self, *, ends: bool) -> tuple[Blocks, Ends | None]:
        mode = self.mode
        blocks = self.checkpoint.load_blocks(self.span, mode.dtype, quantization=mode.quantization)
        return blocks, self.checkpoint.load_ends(mode.dtype) if ends else None

    @property
    def ends(self) -> Ends:
        """The ends, which were asked for."""
        assert self._ends is not None
        return self._ends

    @property
    def hidden_size(self) -> int:
        """The width of hidden states."""
        return self.checkpoint.hidden_size

    def compute(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the one thread that runs torch, as a node does with its ends."""
        return self.engine.thread.run(function).result(DEADLINE)

    def open(self, max_tokens: int, **options: Any) -> LocalSession:
        """A session of one sequence, of an originator of its own. ``options`` are the engine's."""
        self._opened += 1
        session_id = self._opened.to_bytes(16, "big")
        self.engine.open(
            session_id,
            batch=1,
            max_tokens=max_tokens,
            **{"originator": str(self._opened)} | options,
        )
        return LocalSession(self, session_id)

    def once(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` ``[1, rows, hidden]`` through the blocks in a session of its own, float32."""
        session = self.open(hidden.shape[1])
        output = session.submit(to_wire(hidden, self.wire_dtype)).result(DEADLINE)
        session.close()
        return to_torch(output, dtype=torch.float32)

    def read_bytes_a_token(self, length: int) -> int:
        """Bytes that a decoding step cannot but read: weights, and the cache of ``length``."""
        cache = self.blocks.cache_shape.bytes_per_token * length
        return len(self.span) * (block_bytes(self.checkpoint, self.mode) + cache)

    def __enter__(self) -> Local:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.engine.shutdown()


class LocalSession:
    """One session on a ``Local``'s engine, of hidden states or of text."""

    def __init__(self, local: Local, session_id: bytes) -> None:
        self.local = local
        self.session_id = session_id
        self.length = 0
        """Tokens before the next row; set it lower to go back."""
        self._next: WireTensor | None = None
        """The embedding of the token sampled last."""

    def close(self) -> None:
        """Free its cache."""
        self.local.engine.close(self.session_id)

    def submit(self, hidden: WireTensor, keys: Sequence[Label] = ()) -> Future[WireTensor]:
        """Send rows ``[1, rows, hidden]`` through the blocks, behind those before."""
        position, self.length = self.length, self.length + hidden.shape[1]
        return self.local.engine.submit(
            self.session_id,
            position=position,
            hidden=hidden,
            wire_dtype=self.local.wire_dtype,
            span=self.local.span,
            keys=[key for key in keys if position < key[0] <= self.length],
        )

    def submit_all(
        self, frames: Iterable[WireTensor], keys: Sequence[Label] = ()
    ) -> Future[WireTensor]:
        """Send many rows as they come over a link, frame by frame; the last frame's output."""
        waiting: collections.deque[Future[WireTensor]] = collections.deque()
        for frame in frames:
            if len(waiting) == PIECES_ON_THE_WAY:
                waiting.popleft().result(DEADLINE)
            waiting.append(self.submit(frame, keys))
        return waiting[-1]

    # --- hidden states: what a node does for others ---------------------------------------------

    def fill(self, length: int) -> float:
        """Prefill with noise up to ``length``; the seconds that it takes."""
        begin = time.perf_counter()
        if length > self.length:
            frames = frames_of(noise(self.local, length - self.length), self.local.wire_dtype)
            self.submit_all(frames).result(DEADLINE)
        return time.perf_counter() - begin

    def decode_blocks(self, steps: int) -> float:
        """Seconds a step through the blocks, over ``steps``; then the length is as before."""
        length = self.length
        hidden = to_wire(noise(self.local, 1), self.local.wire_dtype)
        seconds = timed(lambda: self.submit(hidden).result(DEADLINE), steps)
        self.length = length
        return seconds

    # --- text: what one process does from the prompt on -----------------------------------------

    def prefill(self, token_ids: Sequence[int]) -> float:
        """Begin anew with a prompt; the seconds until its first new token."""
        self.length = 0
        return timed(lambda: self.sample(self.submit_tokens(token_ids)))

    def decode(self, tokens: int) -> float:
        """Seconds a token over ``tokens``, which are then forgotten: the length stays."""
        length = self.length
        seconds = timed(lambda: self.sample(self.submit_next()), tokens)
        self.length = length
        return seconds

    def submit_tokens(
        self, token_ids: Sequence[int], keys: Sequence[Label] = ()
    ) -> Future[WireTensor]:
        """Send tokens through the blocks; the last frame's output."""
        ids = torch.tensor([list(token_ids)])
        embedded = self.local.compute(lambda: self.local.ends.embed(ids))
        return self.submit_all(frames_of(embedded, self.local.wire_dtype), keys)

    def submit_next(self) -> Future[WireTensor]:
        """Send the token that was sampled last."""
        assert self._next is not None
        return self.submit(self._next)

    def sample(self, output: Future[WireTensor]) -> int:
        """The greedy token behind ``output``; its embedding is made in the same go."""
        hidden = output.result(DEADLINE)

        def compute() -> tuple[int, WireTensor]:
            ends = self.local.ends
            logits = ends.logits(to_torch(hidden)[:, -1:], largest_only=True)
            token = int(logits.numpy().argmax())
            return token, to_wire(ends.embed(torch.tensor([[token]])), self.local.wire_dtype)

        token, self._next = self.local.compute(compute)
        return token


def frames_of(hidden: torch.Tensor, dtype: DType) -> Iterator[WireTensor]:
    """``hidden`` ``[1, rows, hidden]`` as a link cuts it into frames."""
    most = max_rows(1, hidden.shape[2], dtype)
    for start in range(0, hidden.shape[1], most):
        yield to_wire(hidden[:, start : start + most], dtype)


def token_ids(vocabulary: int, count: int, seed: int = 0) -> list[int]:
    """A prompt of random tokens."""
    dice = random.Random(seed)
    return [dice.randrange(vocabulary) for _ in range(count)]


def noise(local: Local, rows: int) -> torch.Tensor:
    """Hidden states ``[1, rows, hidden]`` as random as a block is used to."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn((1, rows, local.hidden_size), generator=generator)
