"""How hypothesis draws frames: for every kind, all that its fields may be."""

import math

from hypothesis import strategies as st
from petals.protocol.checks import (
    MAX_BATCH,
    MAX_BLOCKS,
    MAX_COUNTER,
    MAX_PAST,
    MAX_TOKENS,
    Peer,
    Rewind,
)
from petals.protocol.errors import ErrorCode
from petals.protocol.frames import (
    MAX_SHARDS_ASKED,
    Chunk,
    Close,
    Describe,
    Description,
    Failed,
    Frame,
    Hello,
    Holdings,
    Link,
    ManifestPart,
    NoChunk,
    Open,
    Output,
    Probe,
    Ready,
    Refused,
    Relink,
    Resume,
    State,
    Step,
    WantChunk,
    WantHoldings,
    WantManifest,
)
from petals.protocol.manifest import FIRST_BLOCK, MAX_MANIFEST
from petals.protocol.span import Span
from petals.protocol.tensor import DType, WireTensor

counters = st.integers(0, MAX_COUNTER)
positions = st.integers(0, MAX_TOKENS)
peer_ids = st.text(max_size=128)
sessions = st.binary(min_size=16, max_size=16)
digests = st.lists(st.binary(min_size=32, max_size=32), max_size=128).map(tuple)
orders = st.lists(st.integers(0, MAX_BATCH - 1), max_size=MAX_BATCH).map(tuple)
pasts = st.lists(st.builds(Rewind, counters, positions, orders), max_size=MAX_PAST).map(tuple)
codes = st.sampled_from(ErrorCode)
reasons = st.text(max_size=100)
models = st.text(max_size=64)
shard_numbers = st.integers(0, MAX_BLOCKS + FIRST_BLOCK)
offsets = st.integers(0, MAX_MANIFEST)
payloads = st.binary(max_size=1000)
peers = st.builds(Peer, peer_ids, st.lists(st.text(max_size=256), max_size=8).map(tuple))
spans = (
    st.tuples(st.integers(0, MAX_BLOCKS), st.integers(0, MAX_BLOCKS))
    .filter(lambda pair: pair[0] != pair[1])
    .map(lambda pair: Span(min(pair), max(pair)))
)


@st.composite
def tensors(draw: st.DrawFn) -> WireTensor:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    dtype = draw(st.sampled_from(DType))
    size = math.prod(shape[:-1]) * dtype.row_bytes(shape[-1])
    return WireTensor(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


FRAME_STRATEGIES: dict[str, st.SearchStrategy[Frame]] = {
    "hello": st.builds(
        Hello,
        st.integers(1, 1 << 16),
        st.text(max_size=64),
        st.lists(st.text(max_size=32), max_size=32).map(tuple),
    ),
    "open": st.builds(
        Open,
        session=sessions,
        epoch=counters,
        model=st.text(max_size=128),
        span=spans,
        predecessor=peer_ids,
        successor=st.none() | peers,
        batch=st.integers(1, MAX_BATCH),
        padding=st.lists(positions, max_size=MAX_BATCH).map(tuple),
        max_tokens=st.integers(1, MAX_TOKENS),
        wire_dtype=st.sampled_from(DType),
        prefix=digests,
    ),
    "ready": st.builds(Ready, counters, counters),
    "refused": st.builds(Refused, codes, reasons, st.none() | st.floats(0, 86_400)),
    "link": st.builds(Link, sessions, counters),
    "resume": st.builds(Resume, counters, positions, counters),
    "step": st.builds(
        Step, counters, counters, counters, positions, positions, tensors(), digests, pasts
    ),
    "output": st.builds(Output, counters, positions, tensors()),
    "relink": st.builds(Relink, counters, peer_ids, st.none() | peers),
    "probe": st.builds(Probe, counters),
    "state": st.builds(
        State, counters, positions, counters, positions, counters, st.booleans(), counters
    ),
    "failed": st.builds(Failed, codes, reasons, st.none() | peer_ids),
    "close": st.builds(Close, reasons),
    "describe": st.builds(Describe, st.none() | st.integers(1, MAX_BLOCKS)),
    "description": st.builds(
        Description,
        st.binary(max_size=1000),
        st.dictionaries(st.text(max_size=64), st.floats(-1e18, 1e18), max_size=20),
    ),
    "want_manifest": st.builds(WantManifest, models, offsets),
    "manifest_part": st.builds(ManifestPart, st.integers(1, MAX_MANIFEST), offsets, payloads),
    "want_holdings": st.builds(
        WantHoldings, models, st.lists(shard_numbers, max_size=MAX_SHARDS_ASKED).map(tuple)
    ),
    "holdings": st.builds(Holdings, payloads),
    "want_chunk": st.builds(WantChunk, models, shard_numbers, offsets),
    "chunk": st.builds(Chunk, shard_numbers, offsets, payloads),
    "no_chunk": st.builds(NoChunk, shard_numbers, offsets),
}

frames = st.one_of(*FRAME_STRATEGIES.values())
