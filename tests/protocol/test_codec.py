import itertools
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.protocol.checks import MAX_FRAME, MAX_HEADER, MAX_PLAIN_FRAME
from petals.protocol.codec import FrameDecoder, encode, max_frame, max_rows
from petals.protocol.errors import LocalProtocolError, RemoteProtocolError
from petals.protocol.frames import FRAMES, Chunk, Close, Description, Frame, Output, Probe, State
from petals.protocol.tensor import DType, WireTensor
from support.frame_strategies import FRAME_STRATEGIES, frames
from support.sessions import output


def wire(*sent: Frame) -> bytes:
    return b"".join(buffer for frame in sent for buffer in encode(frame))


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def packed(header: Any, *tensors: bytes) -> bytes:
    return framed(msgpack.packb([header, *tensors]))


def decode(data: bytes) -> Frame:
    (frame,) = FrameDecoder().feed(data)
    return frame


def refused(data: bytes) -> str:
    """What the decoder says about bytes that it must refuse."""
    with pytest.raises(RemoteProtocolError) as refusal:
        FrameDecoder().feed(data)
    return str(refusal.value)


def survives(data: bytes) -> list[Frame]:
    """Decode what may be nonsense: frames or RemoteProtocolError, nothing else.

    Whatever passed is a frame that we could have sent ourselves.
    """
    try:
        decoded = FrameDecoder().feed(data)
    except RemoteProtocolError:
        return []
    for frame in decoded:
        assert decode(wire(frame)) == frame
    return decoded


# --- back and forth -------------------------------------------------------------------------------


def test_there_is_a_strategy_for_every_kind_of_frame() -> None:
    assert FRAME_STRATEGIES.keys() == FRAMES.keys()


@pytest.mark.parametrize("kind", FRAMES)
@given(data=st.data())
def test_every_frame_comes_out_as_it_went_in(kind: str, data: st.DataObject) -> None:
    frame = data.draw(FRAME_STRATEGIES[kind])
    decoded = decode(wire(frame))
    assert type(decoded) is FRAMES[kind]
    assert decoded == frame


@given(st.lists(frames, max_size=6), st.data())
def test_frames_do_not_depend_on_how_the_bytes_were_cut(
    sent: list[Frame], data: st.DataObject
) -> None:
    stream = wire(*sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    decoder = FrameDecoder()
    received: list[Frame] = []
    for start, end in itertools.pairwise([0, *cuts, len(stream)]):
        received += decoder.feed(stream[start:end])
    assert received == sent
    assert not decoder.mid_frame


def test_a_frame_comes_out_with_its_last_byte() -> None:
    stream = wire(output("abc", 4), Probe(7))
    decoder = FrameDecoder()
    received = [
        (end, frame) for end in range(len(stream)) for frame in decoder.feed(stream[end : end + 1])
    ]
    first = len(wire(output("abc", 4)))
    assert received == [(first - 1, output("abc", 4)), (len(stream) - 1, Probe(7))]


def test_the_decoder_knows_when_it_is_in_mid_frame() -> None:
    stream = wire(Probe(1))
    decoder = FrameDecoder()
    seen = []
    for data in (b"", stream + stream[:3], b"", stream[3:]):
        count = len(decoder.feed(data))
        seen.append((count, decoder.mid_frame))
    assert seen == [(0, False), (1, True), (0, True), (1, False)]


def test_any_msgpack_reader_can_read_a_frame() -> None:
    length, body = wire(output("ab/AB", 4))[:4], wire(output("ab/AB", 4))[4:]
    assert int.from_bytes(length, "big") == len(body)
    assert msgpack.unpackb(body) == [
        {
            "kind": "output",
            "rewind": 0,
            "position": 4,
            "tensors": [["float16", [2, 2, 2], "none"]],
        },
        b"aaaabbbbAAAABBBB",
    ]


@pytest.mark.parametrize("rows", [1, 100, 10_000], ids=["bin 8", "bin 16", "bin 32"])
def test_any_msgpack_writer_can_write_a_frame(rows: int) -> None:
    data = bytes(range(8)) * rows
    described = ["float32", [1, rows, 2], "none"]
    written = packed({"kind": "output", "rewind": 1, "position": 2, "tensors": [described]}, data)
    assert decode(written) == Output(1, 2, WireTensor(DType.FLOAT32, (1, rows, 2), data))


def test_a_frame_without_tensors_need_not_say_so() -> None:
    assert decode(packed({"kind": "probe", "nonce": 3})) == Probe(3)


def test_what_newer_versions_say_beyond_our_fields_is_ignored() -> None:
    header = {"kind": "probe", "nonce": 3, "tensors": [], "colour": [1, {"deep": None}]}
    assert decode(packed(header)) == Probe(3)


def test_a_sent_tensor_is_not_copied() -> None:
    data = memoryview(bytearray(64))
    _prefix, _bin, sent = encode(Output(0, 0, WireTensor(DType.FLOAT32, (1, 4, 4), data)))
    assert sent is data


def test_a_received_tensor_is_a_read_only_view_of_the_received_bytes() -> None:
    stream = wire(Probe(1), output("abc", 0))
    _probe, frame = FrameDecoder().feed(stream)
    assert isinstance(frame, Output)
    view = frame.hidden.data
    assert isinstance(view, memoryview)
    assert view.obj is stream
    assert view.readonly


def test_what_came_in_pieces_is_read_only_too_and_stays_as_it_is() -> None:
    stream = wire(output("abc", 0))
    decoder = FrameDecoder()
    decoder.feed(stream[:10])
    (first,) = decoder.feed(stream[10:] + stream[:10])
    (second,) = decoder.feed(wire(output("xyz", 0))[10:])
    assert isinstance(first, Output) and isinstance(first.hidden.data, memoryview)
    assert first.hidden.data.readonly
    assert (first, second) == (output("abc", 0), output("xyz", 0))


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize(("batch", "hidden_size"), [(1, 64), (1, 14_336), (3, 4096), (64, 14_336)])
def test_as_many_rows_as_fit_do_fit(batch: int, hidden_size: int, dtype: DType) -> None:
    rows = max_rows(batch, hidden_size, dtype)
    assert rows >= 1
    shape = (batch, rows, hidden_size)
    tensor = WireTensor(dtype, shape, bytes(batch * rows * dtype.row_bytes(hidden_size)))
    assert len(encode(Output(0, 0, tensor))) == 3


def test_no_row_fits_when_the_hidden_states_of_one_position_are_over_a_frame() -> None:
    assert max_rows(64, 20_000, DType.FLOAT32) == 0


# --- what we must not send ------------------------------------------------------------------------


def test_a_frame_with_a_field_out_of_its_limits_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match=r"probe\.nonce must be an integer from 0 to"):
        encode(Probe(-1))


def test_a_frame_that_is_too_long_is_not_sent() -> None:
    data = bytes(MAX_FRAME)
    with pytest.raises(
        LocalProtocolError, match=rf"a output frame of \d+ bytes is over {MAX_FRAME}"
    ):
        encode(Output(0, 0, WireTensor(DType.FLOAT32, (1, MAX_FRAME // 4, 1), data)))


def test_a_header_that_is_too_long_is_not_sent() -> None:
    figures = {f"{number:02}" + "\N{GRINNING FACE}" * 62: 1.0 for number in range(64)}
    with pytest.raises(LocalProtocolError, match=rf"description has \d+ bytes, over {MAX_HEADER}"):
        encode(Description(b"", figures))


def test_a_text_that_is_not_unicode_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="a text of close is not Unicode"):
        encode(Close("a file name that no one could decode: \udc80"))


# --- what we must not take ------------------------------------------------------------------------


@pytest.mark.parametrize("length", [MAX_FRAME + 1, 0xFFFFFFFF])
def test_a_frame_that_is_too_long_is_refused_by_its_length_alone(length: int) -> None:
    assert refused(length.to_bytes(4, "big")) == f"a frame of {length} bytes is over {MAX_FRAME}"
    assert "is over" in refused(wire(Probe(1)) + length.to_bytes(4, "big"))


def test_the_rest_of_a_frame_over_the_limit_is_not_waited_for() -> None:
    decoder = FrameDecoder(MAX_PLAIN_FRAME)
    long = wire(Output(0, 0, WireTensor(DType.FLOAT32, (1, 8192, 1), bytes(4 * 8192))))
    assert decoder.feed(long[:100]) == []
    with pytest.raises(RemoteProtocolError, match=f"is over {MAX_PLAIN_FRAME}"):
        decoder.feed(long[100:200])


def test_what_is_there_already_is_taken_and_may_raise_the_limit() -> None:
    decoder = FrameDecoder(MAX_PLAIN_FRAME)
    long = wire(Output(0, 0, WireTensor(DType.FLOAT32, (1, 8192, 1), bytes(4 * 8192))))
    probe, _output = decoder.feed(wire(Probe(1)) + long)
    assert probe == Probe(1)
    assert decoder.feed(wire(Probe(2)) + long[:100]) == [Probe(2)]
    decoder.limit = MAX_FRAME
    assert len(decoder.feed(long[100:])) == 1


@pytest.mark.parametrize("rows", [1, 7, 100_000])
def test_a_limit_for_so_many_rows_lets_them_through(rows: int) -> None:
    limit = max_frame(rows, 2, 8, DType.FLOAT32)
    assert limit <= MAX_FRAME
    if rows < 100:
        frame = Output(0, 0, WireTensor(DType.FLOAT32, (2, rows, 8), bytes(2 * rows * 8 * 4)))
        assert limit > MAX_PLAIN_FRAME
        assert len(wire(frame)) - 4 <= limit < len(wire(frame)) + MAX_PLAIN_FRAME


def test_a_frame_as_long_as_may_be_is_waited_for() -> None:
    decoder = FrameDecoder()
    assert decoder.feed(MAX_FRAME.to_bytes(4, "big")) == []
    assert decoder.mid_frame


def test_many_tiny_frames_and_many_tiny_pieces_take_linear_work() -> None:
    """Each of these was a copy of everything behind it once: seconds, where this is a blink."""
    count = 20_000
    stream = wire(Probe(1)) * count
    assert len(FrameDecoder().feed(stream)) == count
    large = wire(Output(0, 0, WireTensor(DType.FLOAT32, (1, 1, 50_000), bytes(200_000))))
    decoder = FrameDecoder()
    pieces = [decoder.feed(large[at : at + 3]) for at in range(0, len(large), 3)]
    assert sum(len(piece) for piece in pieces) == 1


PROBE_MAP = b"\x82\xa4kind\xa5probe\xa5nonce"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x90", id="an empty array"),
        pytest.param(b"\x01", id="no array"),
        pytest.param(b"\xc1", id="a byte that msgpack never uses"),
        pytest.param(b"\x91" + PROBE_MAP, id="a header cut off"),
        pytest.param(b"\x91\x81\xa4kind\xa1\xff", id="a text that is not UTF-8"),
        pytest.param(b"\x91\x81\x01\x02", id="keys that are numbers"),
        pytest.param(b"\x91\xdf\xff\xff\xff\xff", id="a map of 4 billion"),
        pytest.param(b"\x91\x81\xa4kind\xdd\xff\xff\xff\xff", id="a list of 4 billion"),
        pytest.param(b"\x91\x81\xa4kind\xdb\xff\xff\xff\xff", id="a text of 4 GB"),
        pytest.param(b"\x91\x81\xa4kind\xc6\xff\xff\xff\xff", id="bytes of 4 GB"),
        pytest.param(b"\x91\x81\xa4kind\xc9\xff\xff\xff\xff\x01", id="an extension of 4 GB"),
        pytest.param(b"\x91\x81\xa4kind\xd6\xff\x00\x00\x00\x00", id="a timestamp"),
        pytest.param(b"\x91\x81\xa4kind" + b"\x91" * 15_000, id="lists in lists"),
        pytest.param(b"\x91\x81\xa4kind" + b"\x81\xa1a" * 5_000, id="maps in maps"),
        pytest.param(
            b"\x91" + msgpack.packb({"kind": "probe", "nonce": 1, "more": "x" * MAX_HEADER}),
            id="a header over its limit",
        ),
        pytest.param(
            b"\x91" + msgpack.packb({f"{key}": 0 for key in range(257)}), id="too many fields"
        ),
    ],
)
def test_what_is_no_array_with_a_header_in_front_is_refused(body: bytes) -> None:
    assert refused(framed(body)) == (
        "a frame is not a msgpack array with a header of at most 16384 bytes"
    )


@pytest.mark.parametrize("header", [None, 1, "probe", ["probe", 1], b"probe"])
def test_a_header_must_be_a_map(header: object) -> None:
    assert refused(packed(header)) == "a frame's header must be a map"


def test_a_frame_of_unknown_kind_is_refused_by_name() -> None:
    assert refused(packed({"kind": "teleport"})) == "unknown kind of frame 'teleport'"
    assert len(refused(packed({"kind": "x" * 10_000}))) < 100
    assert refused(packed({})) == "unknown kind of frame of type NoneType"
    assert refused(packed({"kind": ["probe"]})) == "unknown kind of frame of type list"


@pytest.mark.parametrize("depth", [10, 1000, 1015])
def test_no_depth_that_msgpack_lets_through_upsets_an_error_message(depth: int) -> None:
    """Python cannot show a list that is nested deeper than its stack is long."""
    deep = b"\x91" * depth + b"\xc0"
    shape = b"\x93\x01\x01\x01"

    def output_with(dtype: bytes, shape: bytes, compression: bytes) -> bytes:
        fields = b"\xa4kind\xa6output\xa6rewind\x00\xa8position\x00\xa7tensors"
        return b"\x92\x84" + fields + b"\x91\x93" + dtype + shape + compression + b"\xc4\x00"

    for body in (
        b"\x91\x81\xa4kind" + deep,
        b"\x91\x81\xa4kind" + b"\x81\xa1a" * depth + b"\xc0",
        b"\x91" + PROBE_MAP + deep,
        output_with(deep, shape, b"\xa4none"),
        output_with(b"\xa7float32", deep, b"\xa4none"),
        output_with(b"\xa7float32", shape, deep),
        b"\x91\x82\xa4kind\xa4open\xaawire_dtype" + deep,
    ):
        assert refused(framed(body))


HEADER = {"kind": "output", "rewind": 0, "position": 0}
FLOATS = ["float32", [1, 1, 2], "none"]


@pytest.mark.parametrize(
    ("described", "tensors"),
    [
        ([], []),
        ([FLOATS], []),
        ([], [bytes(8)]),
        ([FLOATS, FLOATS], [bytes(8), bytes(8)]),
        ({"hidden": FLOATS}, [bytes(8)]),
        (None, [bytes(8)]),
    ],
)
def test_a_frame_carries_exactly_its_tensors(described: object, tensors: list[bytes]) -> None:
    data = packed(HEADER | {"tensors": described}, *tensors)
    assert refused(data) == "a output frame carries 1 tensors"
    assert refused(packed({"kind": "probe", "nonce": 1}, b"")) == "a probe frame carries 0 tensors"


@pytest.mark.parametrize(
    ("described", "complaint"),
    [
        (None, "a tensor's dtype or shape is not a list of at most 3"),
        (["float32", [1, 1, 2]], "a tensor is described by [dtype, shape, compression]"),
        (["float32", [1, 1, 2], "none", 0], "a tensor's dtype or shape is not a list of at most 3"),
        (["float32", [1, 1, 2], "zip"], "unknown tensor compression 'zip' of float32"),
        (["float32", [1, 1, 2], "absmax64"], "unknown tensor compression 'absmax64' of float32"),
        (["float32", [1, 1, 2], None], "unknown tensor compression of type NoneType of float32"),
        (["int8", [1, 1, 8], "none"], "unknown tensor compression 'none' of int8"),
        (["int8", [1, 1, 8], "absmax64"], "a int8 tensor of shape (1, 1, 8) takes 12 bytes, got 8"),
        (["int4", [1, 1, 8], "none"], "a tensor's dtype or shape is not one of float32, bfloat16, float16, int8"),
        ([4, [1, 1, 2], "none"], "a tensor's dtype or shape is not a text of at most 32 characters"),
        (["float32", [1, 0, 2], "none"], "a tensor's dtype or shape is not an integer from 1 to 4194304"),
        (["float32", [1, 1, 1, 1, 2], "none"], "a tensor's dtype or shape is not a list of at most 4"),
        (["float32", [], "none"], "a tensor has 1 to 4 dimensions, got shape ()"),
        (["float32", [1, 1, 3], "none"], "a float32 tensor of shape (1, 1, 3) takes 12 bytes, got 8"),
        (["float16", [1, 1, 2], "none"], "a float16 tensor of shape (1, 1, 2) takes 4 bytes, got 8"),
    ],
)  # fmt: skip
def test_a_tensor_must_be_what_its_description_says(described: object, complaint: str) -> None:
    assert refused(packed(HEADER | {"tensors": [described]}, bytes(8))) == complaint


def test_bytes_are_of_any_length_and_no_tensor() -> None:
    chunk = Chunk(3, 4, b"")
    assert decode(wire(chunk)) == chunk
    header = msgpack.unpackb(wire(chunk)[4:])[0]
    assert header["tensors"] == [["bytes", [0], "none"]]
    for described in (["bytes", [2], "none"], ["float32", [1], "none"], None):
        lying = packed(header | {"tensors": [described]}, b"four")
        assert refused(lying) == "chunk.data must be described as bytes"
    tensor = packed(HEADER | {"tensors": [["bytes", [8], "none"]]}, bytes(8))
    assert "dtype or shape is not one of" in refused(tensor)


def test_tensors_are_msgpack_bins_and_nothing_else() -> None:
    header = b"\x92" + msgpack.packb(HEADER | {"tensors": [FLOATS]})
    message = "a frame's header must be followed by its tensors as msgpack bins"
    assert refused(framed(header)) == message
    assert refused(framed(header + msgpack.packb("12345678"))) == message


@pytest.mark.parametrize(
    "prefix", [b"\xc4\x09", b"\xc5\x00\x09", b"\xc6\x00\x00\x00\x09", b"\xc6\xff"]
)
def test_a_tensor_ends_with_its_frame_at_the_latest(prefix: bytes) -> None:
    body = b"\x92" + msgpack.packb(HEADER | {"tensors": [FLOATS]}) + prefix + bytes(8)
    assert refused(framed(body)) == "a tensor is longer than its frame"


def test_nothing_follows_the_last_tensor() -> None:
    body = msgpack.packb([HEADER | {"tensors": [FLOATS]}, bytes(8)])
    assert refused(framed(body + b"\x00\x00")) == "2 stray bytes behind a output frame"


def test_a_field_that_is_missing_or_wrong_is_named() -> None:
    assert refused(packed({"kind": "probe"})).startswith("probe.nonce must be an integer from 0 to")
    assert decode(packed({"kind": "state", "nonce": 1, "position": 2, "rewind": 0, "produced": 2, "produced_rewind": 0, "successor_linked": False, "passes": 3})) == State(1, 2, 0, 2, 0, False, 3)  # fmt: skip


def test_a_decoder_that_has_raised_raises_or_decodes_but_does_not_break() -> None:
    decoder = FrameDecoder()
    decoder.feed(wire(Probe(1))[:-1])
    with pytest.raises(RemoteProtocolError):
        decoder.feed(b"\xc1" + framed(b"junk"))
    with pytest.raises(RemoteProtocolError):
        decoder.feed(framed(b"junk"))


# --- fuzz -----------------------------------------------------------------------------------------

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.binary(max_size=100))
def test_junk_is_refused_or_waited_for(junk: bytes) -> None:
    survives(junk)
    survives(framed(junk))
    survives(framed(b"\x91\x82\xa4kind" + junk))


@given(frames, st.data())
def test_a_field_of_any_value_is_taken_or_refused(frame: Frame, data: st.DataObject) -> None:
    header, *tensors = msgpack.unpackb(wire(frame)[4:])
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), max_size=3)):
        header[name] = data.draw(plain)
    if data.draw(st.booleans()):
        header.pop(data.draw(st.sampled_from(sorted(header))))
    for decoded in survives(packed(header, *tensors)):
        assert header["kind"] == decoded.KIND


@given(st.lists(frames, min_size=1, max_size=3), st.data())
def test_damaged_frames_are_refused_or_waited_for(sent: list[Frame], data: st.DataObject) -> None:
    stream = bytearray(wire(*sent))
    places = st.integers(0, len(stream) - 1)
    for place in data.draw(st.lists(places, max_size=4)):
        stream[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        start, end = sorted([data.draw(places), data.draw(places)])
        stream[start:end] = stream[data.draw(places) :][: data.draw(st.integers(0, 30))]
    survives(bytes(stream))


@given(frames, st.data())
def test_frames_spliced_inside_their_length_are_refused_or_taken(
    frame: Frame, data: st.DataObject
) -> None:
    body = wire(frame)[4:]
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, len(body)))
    survives(framed(body[:start] + data.draw(st.binary(max_size=12)) + body[end:]))
