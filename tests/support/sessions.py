"""Sessions small enough to read: a row of hidden states is a letter.

Two float16 elements are four bytes, so the row ``a`` is ``b"aaaa"``. A batch of several sequences
is written ``abc/ABC``: three positions of two sequences.
"""

from petals.protocol.checks import Peer, Rewind
from petals.protocol.frames import Open, Output, Step
from petals.protocol.span import Span
from petals.protocol.tensor import DType, WireTensor

HIDDEN_SIZE = 2
SESSION = bytes(range(16))
BLOCKS = Span(2, 4)
AFTER = Peer("after")


def hidden(letters: str) -> WireTensor:
    """The tensor whose rows are ``letters``."""
    lanes = letters.split("/")
    data = b"".join(letter.encode() * 4 for lane in lanes for letter in lane)
    return WireTensor(DType.FLOAT16, (len(lanes), len(lanes[0]), HIDDEN_SIZE), data)


def letters(tensor: WireTensor) -> str:
    """The rows of ``tensor`` as letters again."""
    assert tensor.dtype is DType.FLOAT16 and tensor.shape[2] == HIDDEN_SIZE
    flat = bytes(tensor.data)[::4].decode()
    rows = tensor.shape[1]
    return "/".join(flat[at : at + rows] for at in range(0, len(flat), rows))


def step(
    rows: str,
    position: int = 0,
    *,
    link: int = 0,
    sequence: int = 0,
    rewind: int = 0,
    want_from: int = 0,
    vouched: tuple[bytes, ...] = (),
    past: tuple[Rewind, ...] = (),
) -> Step:
    return Step(link, sequence, rewind, position, want_from, hidden(rows), vouched, past)


def output(rows: str, position: int, *, rewind: int = 0) -> Output:
    return Output(rewind, position, hidden(rows))


def opened(
    *,
    epoch: int = 1,
    span: Span = BLOCKS,
    predecessor: str = "before",
    successor: Peer | None = AFTER,
    batch: int = 1,
    padding: tuple[int, ...] = (0,),
    max_tokens: int = 8,
    model: str = "f00d",
    prefix: tuple[bytes, ...] = (),
) -> Open:
    return Open(
        session=SESSION,
        epoch=epoch,
        model=model,
        span=span,
        predecessor=predecessor,
        successor=successor,
        batch=batch,
        padding=padding,
        max_tokens=max_tokens,
        wire_dtype=DType.FLOAT16,
        prefix=prefix,
    )
