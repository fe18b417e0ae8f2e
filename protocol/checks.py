"""What a value off the wire must be before anything is built from it, and the wire's limits.

A check takes what msgpack unpacked and returns the value for the frame's field, or raises ``BadValueError``,
which says what the value would have to be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import ErrorCode
from .span import Span
from .tensor import DType

MAX_FRAME = 4 * 1024 * 1024
"""Bytes of a frame behind its length. Larger tensors travel as consecutive row chunks, which is
also what lets a long prompt fill the pipeline of hops."""
MAX_HEADER = 16 * 1024
"""Bytes of a frame's header. The largest real one, ``open`` with 64 paddings, is below 3 KiB."""
MAX_PLAIN_FRAME = MAX_HEADER + 1
"""The same of a frame without tensors."""
MAX_BATCH = 64
"""Sequences in one session; a row of 64 BLOOM-176B hidden states in fp32 still fits a frame."""
MAX_TOKENS = 1 << 20
"""Positions of one session: far more than any model's context, far less than an overflow."""
MAX_BLOCKS = 10_000
MAX_ADDRESSES = 8
MAX_ADDRESS = 256
MAX_REASON = 1024
MAX_COUNTER = 1 << 53
"""Epochs, link numbers and the like: what any msgpack reader holds exactly, JavaScript's too."""

MAX_PAST = 16
"""Rewinds that a step tells of. A ring has one or two under way; who has missed more than these is
sent everything again."""

SESSION_ID_BYTES = 16
LENGTH_BYTES = 4

Check = Callable[[Any], Any]


class BadValueError(Exception):
    """What is wrong with one field; becomes a RemoteProtocolError that names frame and field."""


def integer(low: int, high: int) -> Check:
    """An integer in ``low..high``; a bool is none."""

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise BadValueError(f"an integer from {low} to {high}")
        return value

    return check


def boolean(value: Any) -> bool:
    """True or false; nothing else stands for them."""
    if not isinstance(value, bool):
        raise BadValueError("true or false")
    return value


def text(limit: int) -> Check:
    """A text of at most ``limit`` characters."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or len(value) > limit:
            raise BadValueError(f"a text of at most {limit} characters")
        return value

    return check


def number(low: float, high: float) -> Check:
    """A finite number in ``low..high``, as float."""

    def check(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise BadValueError(f"a number from {low} to {high}")
        return float(value)

    return check


def binary(low: int, high: int) -> Check:
    """``low..high`` bytes."""

    def check(value: Any) -> bytes:
        if not isinstance(value, bytes) or not low <= len(value) <= high:
            raise BadValueError(f"{low} to {high} bytes")
        return value

    return check


def optional(inner: Check) -> Check:
    """None, or what ``inner`` says."""
    return lambda value: None if value is None else inner(value)


def tuple_of(inner: Check, limit: int) -> Check:
    """A list of at most ``limit`` values that ``inner`` takes, as tuple."""

    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or len(value) > limit:
            raise BadValueError(f"a list of at most {limit}")
        return tuple(inner(item) for item in value)

    return check


def span(value: Any) -> Span:
    """``[start, end]``."""
    pair = tuple_of(integer(0, MAX_BLOCKS), 2)(value)
    if len(pair) != 2 or pair[0] >= pair[1]:
        raise BadValueError("a [start, end] of blocks with start < end")
    return Span(*pair)


def dtype(value: Any) -> DType:
    """The name of an element type."""
    try:
        return DType(text(32)(value))
    except ValueError:
        raise BadValueError(f"one of {', '.join(DType)}") from None


def error_code(value: Any) -> ErrorCode:
    """An error code; one that we do not know is OTHER."""
    return ErrorCode.parse(text(32)(value))


def figures(value: Any) -> dict[str, float]:
    """A small map from names to numbers."""
    if not isinstance(value, dict) or len(value) > 64:
        raise BadValueError("a map of at most 64 figures")
    name, figure = text(64), number(-1e18, 1e18)
    return {name(key): figure(item) for key, item in value.items()}


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer and where to dial it."""

    peer_id: str
    multiaddrs: tuple[str, ...] = ()


class Rewind(NamedTuple):
    """The originator going back, or taking other sequences of the batch on (beam search)."""

    number: int
    """1, 2, 3, … of the session."""
    position: int
    """What is here and behind is void."""
    order: tuple[int, ...] = ()
    """Of what is before, sequence b of the batch is from now on what ``order[b]`` was; () as it was."""


peer_id = text(128)
counter = integer(0, MAX_COUNTER)
position = integer(0, MAX_TOKENS)
_order = tuple_of(integer(0, MAX_BATCH - 1), MAX_BATCH)


def rewind(value: Any) -> Rewind:
    """``[number, position, order]``."""
    fields = tuple_of(lambda item: item, 3)(value)
    if len(fields) != 3:
        raise BadValueError("a [number, position, order]")
    return Rewind(counter(fields[0]), position(fields[1]), _order(fields[2]))


def peer(value: Any) -> Peer:
    """``[peer id, [multiaddr, …]]``."""
    pair = tuple_of(lambda item: item, 2)(value)
    if len(pair) != 2:
        raise BadValueError("a [peer id, multiaddrs]")
    return Peer(peer_id(pair[0]), tuple_of(text(MAX_ADDRESS), MAX_ADDRESSES)(pair[1]))
