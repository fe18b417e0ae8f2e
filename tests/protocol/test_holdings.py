import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.protocol.errors import RemoteProtocolError
from petals.protocol.holdings import everything, holds, join, pack, split


@given(st.integers(1, 60), st.data())
def test_what_is_packed_is_held_and_nothing_else(count: int, data: st.DataObject) -> None:
    chunks = data.draw(st.sets(st.integers(0, count - 1)))
    bits = pack(chunks, count)
    assert {chunk for chunk in range(count + 20) if holds(bits, chunk)} == chunks
    assert pack(range(count), count) == everything(count)


def test_somebody_who_said_nothing_holds_nothing() -> None:
    assert not holds(b"", 0)


def test_several_shards_travel_as_one() -> None:
    parts = [everything(9), pack([1], 3), b""]
    assert split(memoryview(join(parts)), [9, 3, 0]) == parts
    with pytest.raises(RemoteProtocolError, match="holdings of 4 bytes were sent, 3 were due"):
        split(bytes(4), [9, 3])
