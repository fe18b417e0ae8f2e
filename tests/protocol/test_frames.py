"""What a frame may carry, as a peer meets it: through the decoder, and before sending."""

import dataclasses
import re
from typing import Any

import msgpack
import pytest
from petals.protocol.checks import BadValueError, Peer
from petals.protocol.codec import FrameDecoder, encode
from petals.protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from petals.protocol.frames import (
    FRAMES,
    Close,
    Description,
    Failed,
    Frame,
    Hello,
    Open,
    Ready,
    Refused,
    Relink,
    Resume,
    State,
    Step,
)
from petals.protocol.tensor import DType
from support.sessions import opened

EXAMPLES: list[Frame] = [
    Hello(1, "0.1.0", ("x",)),
    opened(successor=Peer("after", ("/ip4/127.0.0.1/tcp/1",))),
    Ready(1, 100),
    Refused(ErrorCode.BUSY, "full", 2.5),
    Resume(1, 2, 3),
    Relink(2, "before", None),
    State(1, 4, 0, 3, 0, True),
    Failed(ErrorCode.COMPUTE, "out of memory", "after"),
    Close("done"),
    Description(b"signed", {"sessions": 2.0}),
]


def header_of(frame: Frame) -> dict[str, Any]:
    header: dict[str, Any] = msgpack.unpackb(b"".join(encode(frame))[4:])[0]
    return header


def decode(header: dict[str, Any]) -> Frame:
    body = msgpack.packb([header])
    (frame,) = FrameDecoder().feed(len(body).to_bytes(4, "big") + body)
    return frame


@pytest.mark.parametrize("frame", FRAMES.values())
def test_every_field_has_a_check_or_is_a_tensor_or_bytes(frame: type[Frame]) -> None:
    types = {field.name: field.type for field in dataclasses.fields(frame)}
    tensors = [name for name in types if name not in frame.CHECKS and name not in frame.BYTES]
    assert frame.CHECKS.keys() | frame.BYTES <= types.keys()
    assert not frame.CHECKS.keys() & frame.BYTES
    assert all(types[name].__name__ == "WireTensor" for name in tensors)  # type: ignore[union-attr]


def test_frames_are_values() -> None:
    assert Ready(1, 2) == Ready(1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Ready(1, 2).epoch = 2  # type: ignore[misc]


MAY_BE_NONE = {"open.successor", "refused.retry_after", "relink.successor", "failed.peer_id"}


@pytest.mark.parametrize("frame", EXAMPLES, ids=lambda frame: frame.KIND)
def test_no_field_may_be_missing_unless_it_may_be_none(frame: Frame) -> None:
    for name in type(frame).CHECKS:
        header = header_of(frame)
        del header[name]
        field = f"{frame.KIND}.{name}"
        if field in MAY_BE_NONE:
            assert getattr(decode(header), name) is None
        else:
            with pytest.raises(RemoteProtocolError, match=f"^{field} must be "):
                decode(header)


BAD_FIELDS = [
    ("hello", "version", 0, "an integer from 1 to 65536"),
    ("hello", "version", True, "an integer from 1 to 65536"),
    ("hello", "version", 1.0, "an integer from 1 to 65536"),
    ("hello", "node_version", "v" * 65, "a text of at most 64 characters"),
    ("hello", "node_version", b"v", "a text of at most 64 characters"),
    ("hello", "features", ["x"] * 33, "a list of at most 32"),
    ("hello", "features", "xyz", "a list of at most 32"),
    ("hello", "features", ["x" * 33], "a text of at most 32 characters"),
    ("open", "session", bytes(15), "16 to 16 bytes"),
    ("open", "session", "x" * 16, "16 to 16 bytes"),
    ("open", "epoch", -1, "an integer from 0 to 9007199254740992"),
    ("open", "epoch", (1 << 53) + 1, "an integer from 0 to 9007199254740992"),
    ("open", "span", [2, 2], "a [start, end] of blocks with start < end"),
    ("open", "span", [3, 2], "a [start, end] of blocks with start < end"),
    ("open", "span", [3], "a [start, end] of blocks with start < end"),
    ("open", "span", [0, 1, 2], "a list of at most 2"),
    ("open", "span", [0, 10_001], "an integer from 0 to 10000"),
    ("open", "predecessor", None, "a text of at most 128 characters"),
    ("open", "successor", ["after"], "a [peer id, multiaddrs]"),
    ("open", "successor", "after", "a list of at most 2"),
    ("open", "successor", ["after", ["/a"] * 9], "a list of at most 8"),
    ("open", "successor", ["after", ["/" * 257]], "a text of at most 256 characters"),
    ("open", "successor", [7, []], "a text of at most 128 characters"),
    ("open", "batch", 0, "an integer from 1 to 64"),
    ("open", "batch", 65, "an integer from 1 to 64"),
    ("open", "padding", [0] * 65, "a list of at most 64"),
    ("open", "padding", [-1], "an integer from 0 to 1048576"),
    ("open", "max_tokens", 0, "an integer from 1 to 1048576"),
    ("open", "wire_dtype", "int4", "one of float32, bfloat16, float16, int8"),
    ("open", "wire_dtype", ["float32"], "a text of at most 32 characters"),
    ("open", "prefix", [bytes(31)], "32 to 32 bytes"),
    ("open", "prefix", [bytes(32)] * 129, "a list of at most 128"),
    ("refused", "code", 7, "a text of at most 32 characters"),
    ("refused", "reason", "r" * 1025, "a text of at most 1024 characters"),
    ("refused", "retry_after", -0.5, "a number from 0 to 86400"),
    ("refused", "retry_after", float("nan"), "a number from 0 to 86400"),
    ("refused", "retry_after", float("inf"), "a number from 0 to 86400"),
    ("refused", "retry_after", True, "a number from 0 to 86400"),
    ("refused", "retry_after", "1", "a number from 0 to 86400"),
    ("state", "successor_linked", "false", "true or false"),
    ("state", "successor_linked", 0, "true or false"),
    ("description", "announcement", bytes(8193), "0 to 8192 bytes"),
    ("description", "figures", [], "a map of at most 64 figures"),
    ("description", "figures", {str(at): 0 for at in range(65)}, "a map of at most 64 figures"),
    ("description", "figures", {"n" * 65: 0}, "a text of at most 64 characters"),
    ("description", "figures", {"x": "y"}, "a number from -1e+18 to 1e+18"),
]


@pytest.mark.parametrize(("kind", "field", "value", "allowed"), BAD_FIELDS)
def test_a_bad_field_is_refused_in_words(
    kind: str, field: str, value: object, allowed: str
) -> None:
    (example,) = [frame for frame in EXAMPLES if kind == frame.KIND]
    with pytest.raises(RemoteProtocolError) as refusal:
        decode(header_of(example) | {field: value})
    assert str(refusal.value) == f"{kind}.{field} must be {allowed}"


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (opened(batch=65), "open.batch must be an integer from 1 to 64"),
        (opened(padding=(0,) * 65), "open.padding must be a list of at most 64"),
        (opened(max_tokens=0), "open.max_tokens must be an integer from 1 to 1048576"),
        (opened(successor=Peer("x", ("/a",) * 9)), "open.successor must be a list of at most 8"),
        (Close("r" * 1025), "close.reason must be a text of at most 1024 characters"),
        (Resume(-1, 0, 0), "resume.link must be an integer from 0 to 9007199254740992"),
        (Description(bytes(8193), {}), "description.announcement must be 0 to 8192 bytes"),
    ],
)
def test_what_a_peer_would_refuse_is_not_sent(frame: Frame, complaint: str) -> None:
    with pytest.raises(LocalProtocolError) as misuse:
        encode(frame)
    assert str(misuse.value) == complaint


def test_an_error_code_of_a_newer_version_is_other() -> None:
    header = header_of(Failed(ErrorCode.COMPUTE, "new kind of trouble")) | {"code": "meltdown"}
    assert decode(header) == Failed(ErrorCode.OTHER, "new kind of trouble")


def test_fields_arrive_in_the_types_that_the_frame_declares() -> None:
    frame = decode(header_of(opened(successor=Peer("after", ("/ip4/127.0.0.1/tcp/1",)))))
    assert isinstance(frame, Open)
    assert frame.successor == Peer("after", ("/ip4/127.0.0.1/tcp/1",))
    assert type(frame.padding) is tuple
    assert frame.wire_dtype is DType.FLOAT16
    refused = decode(header_of(Refused(ErrorCode.BUSY, "full", 2)))
    assert isinstance(refused, Refused) and type(refused.retry_after) is float


@pytest.mark.parametrize(
    ("past", "allowed"),
    [
        ([[1, 2]], "a [number, position, order]"),
        ([[1, 2, [64]]], "an integer from 0 to 63"),
        ([[1, 2, [0] * 65]], "a list of at most 64"),
        ([[1, 2, []]] * 17, "a list of at most 16"),
    ],
)
def test_a_past_that_cannot_be_is_refused_in_words(past: object, allowed: str) -> None:
    with pytest.raises(BadValueError, match=f"^{re.escape(allowed)}$"):
        Step.CHECKS["past"](past)
