import itertools
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.protocol import announcement as module
from petals.protocol.announcement import (
    CLOCK_SKEW,
    MAX_ENTRY_BYTES,
    MAX_RECORD_BYTES,
    MAX_RECORD_ENTRIES,
    MAX_TIME_TO_LIVE,
    SAMPLE_SECONDS,
    SWARM_KEY,
    Announcement,
    PeerState,
    as_model_name,
    as_multiaddrs,
    as_public_name,
    decode_signed,
    encode_signed,
    merge_entries,
    model_key,
    region_keys,
    weights_key,
)
from petals.protocol.announcement_body import NAMES
from petals.protocol.announcement_body import USUAL as LEFT_OUT
from petals.protocol.coordinates import Coordinate
from petals.protocol.errors import LocalProtocolError, RemoteProtocolError
from petals.protocol.span import Span
from support.announcements import MODEL, NOW, announce, entry, peer_id, signer

SPAN = Span(2, 6)

# every field at its limit
LARGEST = announce(
    1,
    Span(9_998, 10_000),
    multiaddrs=tuple("/" + "x" * 255 for _ in range(8)),
    model="f" * 64,
    model_name="x" * 96,
    num_blocks=10_000,
    dtype="x" * 24,
    decode_speed=1e12,
    prefill_speed=1e12,
    cache_tokens_left=1 << 53,
    sessions=1 << 20,
    session_blocks=1 << 53,
    version="9" * 24,
    sequence=1 << 53,
    public_name="\N{OLD ITALIC LETTER A}" * 64,
    network_speed=1e12,
    round_trips={peer_id(number): 59.9 for number in range(2, 18)},
    coordinate=Coordinate((-60.0,) * 3, 60.0, 1.0),
    shards=tuple(Span(9_000 + 2 * run, 9_001 + 2 * run) for run in range(12)),
)


def forge(fields: dict[Any, Any], number: int = 1) -> bytes:
    """An entry with this body, rightly signed, whatever the body says."""
    body = msgpack.packb({NAMES.get(name, name): value for name, value in fields.items()})
    return bytes(msgpack.packb([body, signer(number)(module._SIGNED_AS + body)]))


def body_of(data: bytes) -> dict[str, Any]:
    """The fields that an entry says something of."""
    body = msgpack.unpackb(msgpack.unpackb(data)[0])
    return {name: body[short] for name, short in NAMES.items() if short in body}


USUAL = body_of(entry(1, SPAN))


@pytest.mark.parametrize(
    "made",
    [
        announce(1, SPAN),
        announce(2, None, state=PeerState.JOINING, multiaddrs=()),
        announce(3, SPAN, public_name="Zoë ☃", network_speed=1e6, round_trips={peer_id(4): 0.25}),
        announce(
            4,
            SPAN,
            moving_to=Span(0, 3),
            multiaddrs=(f"/ip4/10.0.0.4/tcp/1/p2p/{peer_id(4)}", f"/ip4/1.1.1.1/p2p/{peer_id(3)}"),
            model="abcdef123",
            coordinate=Coordinate((0.125, -0.25, 0.0), 0.00401, 0.5),
        ),
        LARGEST,
    ],
    ids=["usual", "without a span", "with all fields", "with peer ids in addresses", "largest"],
)
def test_an_announcement_survives_the_wire(made: Announcement) -> None:
    number = next(n for n in range(1, 5) if peer_id(n) == made.peer_id)
    assert decode_signed(encode_signed(made, signer(number)), NOW) == made


@pytest.mark.parametrize(
    "bad",
    [
        {"peer_id": "12D3KooW"},
        {"peer_id": peer_id(1) + " "},
        {"peer_id": "0" * 52},
        {"peer_id": "1" * 65},
        {"peer_id": 7},
        {"multiaddrs": ("/ip4/1.2.3.4/tcp/1",) * 9},
        {"multiaddrs": ("/" + "x" * 256,)},
        {"multiaddrs": ("not a multiaddr",)},
        {"multiaddrs": ("/ip4/\x1b[2J",)},
        {"multiaddrs": (7,)},
        {"model": "demo"},
        {"model": "AB" * 32},
        {"model": "ab" * 33},
        {"model_name": ""},
        {"model_name": "x" * 97},
        {"model_name": "two\nlines"},
        {"num_blocks": 0},
        {"num_blocks": 10_001},
        {"num_blocks": True},
        {"num_blocks": 8.0},
        {"num_blocks": 5},
        {"span": (2, 6, 8)},
        {"span": (6, 2)},
        {"state": "bored"},
        {"state": []},
        {"dtype": "float 32"},
        {"decode_speed": float("nan")},
        {"decode_speed": float("inf")},
        {"decode_speed": -1.0},
        {"decode_speed": 10**400},
        {"prefill_speed": "fast"},
        {"cache_tokens_left": -1},
        {"sessions": 1 << 21},
        {"version": "1.0\n"},
        {"sequence": 1 << 54},
        {"expires_at": float("nan")},
        {"public_name": "x" * 65},
        {"public_name": ""},
        {"public_name": 7},
        {"public_name": "red \x1b[31m"},
        {"public_name": "evil \N{RIGHT-TO-LEFT OVERRIDE}"},
        {"public_name": "two\nlines"},
        {"network_speed": float("inf")},
        {"round_trips": {peer_id(number): 0.1 for number in range(2, 19)}},
        {"round_trips": {"somebody": 0.1}},
        {"round_trips": {peer_id(2): -0.1}},
        {"round_trips": [0.1]},
        {"coordinate": [0, 0, 0, 1]},
        {"coordinate": [0, 0, 6_000_001, 1, 1]},
        {"coordinate": [0, 0, 0.5, 1, 1]},
        {"coordinate": [0, 0, float("nan"), 1, 1]},
        {"coordinate": [0, 0, 0, 0, 1]},
        {"coordinate": [0, 0, 0, 1, 101]},
        {"coordinate": 7},
        {"shards": ((0, 1),) * 13},
        {"shards": ((1, 1),)},
    ],
    ids=lambda bad: "-".join(f"{name}={value!r:.30}" for name, value in bad.items()),
)
def test_a_field_out_of_bounds_is_refused_on_both_sides(bad: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError, match=r"announcement's|not within"):
        encode_signed(replace(announce(1, SPAN), **bad), signer(1))
    if bad.get("decode_speed") != 10**400:  # which msgpack cannot even say
        with pytest.raises(RemoteProtocolError, match=r"announcement's|not within"):
            decode_signed(forge(USUAL | bad), NOW)


@pytest.mark.parametrize("name", sorted(Announcement.CHECKS))
def test_a_missing_field_is_refused_unless_it_may_be_none(name: str) -> None:
    data = forge({field: value for field, value in USUAL.items() if field != name})
    if name in LEFT_OUT:
        assert getattr(decode_signed(data, NOW), name) == LEFT_OUT[name]
    else:
        with pytest.raises(RemoteProtocolError, match=f"announcement's {name} must be"):
            decode_signed(data, NOW)


def test_an_announcement_that_somebody_else_signed_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="not signed by the peer it names"):
        decode_signed(encode_signed(announce(1, SPAN), signer(2)), NOW)


@given(st.data())
def test_any_change_to_an_entry_is_noticed(data: st.DataObject) -> None:
    entry_bytes = bytearray(entry(1, SPAN))
    place = data.draw(st.integers(0, len(entry_bytes) - 1))
    entry_bytes[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RemoteProtocolError):
        decode_signed(bytes(entry_bytes), NOW)


def test_an_announcement_holds_until_it_expires() -> None:
    data = entry(1, SPAN, expires_at=NOW)
    assert decode_signed(data, NOW - 0.1).sequence == 1
    with pytest.raises(RemoteProtocolError, match=r"expired 0 s ago \(are both clocks right"):
        decode_signed(data, NOW)
    latest = MAX_TIME_TO_LIVE + CLOCK_SKEW
    assert decode_signed(data, NOW - latest).sequence == 1
    with pytest.raises(RemoteProtocolError, match="expires 361 s from now"):
        decode_signed(data, NOW - latest - 1)


def test_an_oversized_announcement_is_neither_sent_nor_read() -> None:
    grown = replace(announce(1, SPAN), unknown={"essay": "x" * MAX_ENTRY_BYTES})
    with pytest.raises(LocalProtocolError, match="is over 4096"):
        encode_signed(grown, signer(1))
    with pytest.raises(RemoteProtocolError, match="is over 4096"):
        decode_signed(forge(USUAL | {"essay": "x" * MAX_ENTRY_BYTES}), NOW)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid msgpack"),
        (b"\xc1", "not valid msgpack"),
        (b"\x91" * 2000, "not valid msgpack"),
        (msgpack.packb([b"body"]), r"must be \[body, signature\]"),
        (msgpack.packb([b"body", "signature"]), r"must be \[body, signature\]"),
        (msgpack.packb([b"\xa1\xff", b"signature"]), "not valid msgpack"),
        (forge({b"peer_id": 1}), "map of fields by name"),
        (msgpack.packb([msgpack.packb([1]), b"signature"]), "map of fields by name"),
    ],
)
def test_junk_is_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        decode_signed(data, NOW)


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.binary(max_size=300) | junk.map(msgpack.packb))
def test_any_bytes_are_refused_as_the_peers_fault(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_signed(data, NOW)


@given(st.sampled_from(sorted(Announcement.CHECKS)), junk)
def test_any_value_in_any_field_is_read_or_refused(name: str, value: Any) -> None:
    data = forge(USUAL | {name: value})
    try:
        read = decode_signed(data, NOW)
    except RemoteProtocolError:
        return
    encode_signed(read, signer(1))  # what was read could be said again


def test_fields_of_a_newer_version_are_kept() -> None:
    newer = {"mood": ["calm", {"since": 3}], "stamp": msgpack.Timestamp(7)}
    read = decode_signed(forge(USUAL | newer), NOW)
    assert read.unknown == newer
    again = decode_signed(encode_signed(read, signer(1)), NOW)
    assert again == read


@pytest.mark.parametrize("depth", [9, 900])
def test_nesting_is_bounded(depth: int) -> None:
    deep: Any = None
    for _ in range(depth):
        deep = [deep]
    with pytest.raises(RemoteProtocolError, match=r"nested more than 8 deep|not valid msgpack"):
        decode_signed(forge(USUAL | {"deep": deep}), NOW)


def test_text_is_made_fit_to_be_a_name() -> None:
    assert as_public_name("Zoë's \x1b[31mnode\n") == "Zoë's ?[31mnode?"
    assert as_model_name("Zoë/bloom\x1b") == "Zo?/bloom?"
    assert as_public_name("") == as_model_name("") == "?"
    assert len(as_public_name("x" * 100)) == 64
    assert len(as_model_name("x" * 100)) == 96


def test_addresses_that_cannot_be_announced_are_left_out() -> None:
    good = [f"/ip4/10.0.0.{n}/tcp/1" for n in range(9)]
    assert as_multiaddrs(["", "nonsense", "/ip4/\n", "/" + "x" * 256, *good]) == tuple(good[:8])


def test_regions_are_eight_blocks_wide() -> None:
    whole = region_keys(MODEL, Span(0, 70))
    assert len(set(whole)) == 9
    assert region_keys(MODEL, Span(0, 8)) == whole[:1]
    assert region_keys(MODEL, Span(7, 9)) == whole[:2]
    assert region_keys(MODEL, Span(69, 70)) == whole[8:]
    assert not set(whole) & set(region_keys("cd" * 32, Span(0, 70)))


def test_keys_are_short_enough_to_be_looked_up() -> None:
    for key in (
        *(*region_keys(MODEL, Span(0, 10_000)), model_key("x" * 96)),
        *(weights_key(MODEL), SWARM_KEY),
    ):
        assert len(key) <= 50
        assert key.decode("ascii").startswith("/petals/")


# --- records ---


entries = st.builds(
    lambda number, sequence, sessions, lifetime: entry(
        number, SPAN, sequence=sequence, sessions=sessions, expires_at=NOW + lifetime
    ),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 1),
    st.sampled_from([-1, 20, 60, 400]),
)
records = st.lists(entries | st.binary(max_size=20), max_size=8)


def merge(*parts: list[bytes]) -> list[bytes]:
    return merge_entries(parts[0], itertools.chain(*parts[1:]), NOW, salt=b"salt")


@given(records, records, records)
def test_merging_is_the_same_in_any_order_and_number(
    one: list[bytes], two: list[bytes], three: list[bytes]
) -> None:
    merged = merge(one, two, three)
    assert merge(three, one, two) == merged
    assert merge(merge(one, two), three) == merged
    assert merge(one, merge(two, three)) == merged
    assert merge(merged, merged) == merged
    assert merge(merged, one) == merged


@given(records)
def test_merging_keeps_the_newest_of_each_peer(record: list[bytes]) -> None:
    valid = []
    for data in record:
        try:
            valid.append(decode_signed(data, NOW))
        except RemoteProtocolError:
            continue
    newest = {
        peer: max(made.sequence for made in valid if made.peer_id == peer)
        for peer in {made.peer_id for made in valid}
    }
    merged = [decode_signed(data, NOW) for data in merge([], record)]
    assert {made.peer_id: made.sequence for made in merged} == newest
    assert len(merged) == len(newest)


MANY = [entry(number, SPAN) for number in range(1, 321)]
MANY_LONG = [
    entry(number, SPAN, multiaddrs=tuple(f"/dns/{'x' * 200}{n}" for n in range(8)))
    for number in range(1, 61)
]


@pytest.mark.parametrize("crowd", [MANY, MANY_LONG], ids=["many", "long"])
def test_a_full_record_is_a_fair_sample(crowd: list[bytes]) -> None:
    times = dict.fromkeys(crowd, 0)
    rounds = 60
    half = len(crowd) // 2
    for number in range(rounds):
        merged = merge_entries(crowd[:half], crowd[half:], NOW, salt=b"%d" % number)
        assert merge_entries(merged, crowd, NOW, salt=b"%d" % number) == merged
        assert len(merged) <= MAX_RECORD_ENTRIES
        assert MAX_RECORD_BYTES * 0.9 < len(msgpack.packb(merged)) <= MAX_RECORD_BYTES
        for data in merged:
            times[data] += 1
    share = sum(times.values()) / len(crowd) / rounds
    deviation = (rounds * share * (1 - share)) ** 0.5
    assert all(abs(count - rounds * share) < 5 * deviation for count in times.values())


def test_a_full_record_holds_others_after_a_while_and_a_reader_keeps_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_RECORD_ENTRIES", 5)
    lasting = [entry(number, SPAN, expires_at=NOW + 300) for number in range(1, 31)]
    turns = [
        frozenset(merge_entries([], lasting, NOW + later, salt=b"salt"))
        for later in (0, SAMPLE_SECONDS / 2, -SAMPLE_SECONDS / 2)
    ]
    assert len(set(turns)) == 2, "one of them is of another turn"
    assert len(merge_entries([], lasting, NOW, salt=b"salt", whole=True)) == 30


def test_a_record_of_small_entries_is_bounded_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORD_ENTRIES", 5)
    merged = merge_entries(MANY[:3], MANY[3:8], NOW, salt=b"salt")
    assert len(merged) == 5
    assert set(merged) < set(MANY[:8])


def test_a_node_is_relayed_when_all_its_addresses_lead_through_relays() -> None:
    direct = "/ip4/10.0.0.1/tcp/4001"
    circuit = f"/ip4/10.0.0.9/tcp/4001/p2p/{peer_id(9)}/p2p-circuit"
    for multiaddrs, relayed in (
        ((), False),
        ((direct,), False),
        ((circuit, direct), False),
        ((circuit,), True),
    ):
        assert announce(1, Span(0, 3), multiaddrs=multiaddrs).relayed is relayed
