"""Whom a download asks for what, in a world of a few chunks and peers."""

from collections import Counter
from collections.abc import Collection
from random import Random  # noqa: TID251 - tests throw dice with known seeds

from petals.protocol.download import (
    FRONTIER,
    MAX_WINDOW,
    PATIENCE,
    REFILL,
    REORDER_SECONDS,
    STALE_SECONDS,
    Ask,
    Download,
)
from petals.protocol.holdings import everything, pack
from petals.protocol.manifest import (
    ENDS,
    FIRST_BLOCK,
    HASH_BYTES,
    MIN_CHUNK,
    File,
    Manifest,
    Shard,
    Tensor,
)

BLOCK, NEXT_BLOCK = FIRST_BLOCK, FIRST_BLOCK + 1
CHUNKS = 10


def shard(name: str, chunks: int) -> Shard:
    tensor = Tensor(name, "float16", (MIN_CHUNK // 2, chunks))
    return Shard((tensor,), bytes(HASH_BYTES * chunks))


def model(chunks: int = CHUNKS) -> Manifest:
    files = Shard((File("config.json", 5),), bytes(HASH_BYTES))
    blocks = tuple(shard(f"h.{block}.w", chunks) for block in range(2))
    return Manifest(MIN_CHUNK, files, shard("ends", 1), blocks)


def download(chunks: int = CHUNKS, *, seed: int = 0, of: Collection[int] = (BLOCK,)) -> Download:
    missing = {number: range(chunks) for number in of}
    return Download(model(chunks), missing, dice=Random(seed))


def chunks_asked(asks: list[Ask], peer_id: str) -> set[int]:
    return {ask.chunk for ask in asks if ask.peer_id == peer_id}


def run(
    fetch: Download, rates: dict[str, float], *, until: float = 1000.0, step: float = 0.05
) -> float:
    """Peers send what they are asked for at so many bytes a second; returns when all is there."""
    queues: dict[str, list[Ask]] = {peer_id: [] for peer_id in rates}
    credit = dict.fromkeys(rates, 0.0)
    now = 0.0
    while not fetch.done and now < until:
        for ask in fetch.plan(now):
            queues[ask.peer_id].append(ask)
        now += step
        for peer_id, rate in rates.items():
            credit[peer_id] = min(credit[peer_id] + rate * step, rate * step + MIN_CHUNK)
            while queues[peer_id] and credit[peer_id] >= MIN_CHUNK:
                credit[peer_id] -= MIN_CHUNK
                ask = queues[peer_id].pop(0)
                fetch.arrived(peer_id, ask.shard, ask.chunk, now)
    return now


def test_nothing_is_asked_of_nobody() -> None:
    fetch = download()
    assert fetch.plan(0.0) == []
    assert fetch.left == CHUNKS * MIN_CHUNK
    assert fetch.unheld() == [(BLOCK, chunk) for chunk in range(CHUNKS)]
    assert fetch.unheld(besides=[BLOCK]) == []
    assert not fetch.done
    assert repr(fetch) == "<Download: 655360 bytes left, 0 chunks under way, 0 peers>"


def test_everything_comes_from_whoever_has_it() -> None:
    fetch = download(of=[BLOCK, NEXT_BLOCK])
    fetch.heard("seed", {n: everything(CHUNKS) for n in (BLOCK, NEXT_BLOCK)}, 0.0)
    run(fetch, {"seed": 1e6})
    assert fetch.done
    assert fetch.left == 0
    assert fetch.shards == ()
    assert sum(fetch.received.values()) == 2 * CHUNKS * MIN_CHUNK


def test_a_chunk_is_asked_of_one_peer_at_a_time() -> None:
    fetch = download()
    for peer_id in "ab":
        fetch.heard(peer_id, {BLOCK: everything(CHUNKS)}, 0.0)
    asked = [(ask.shard, ask.chunk) for ask in fetch.plan(0.0)]
    assert len(asked) == len(set(asked)) == 4
    assert fetch.plan(0.0) == []


def test_the_rarest_chunks_come_first() -> None:
    fetch = download()
    fetch.heard("a", {BLOCK: everything(CHUNKS)}, 0.0)
    fetch.heard("b", {BLOCK: pack([2, 3, 4, 5, 6, 7, 8, 9], CHUNKS)}, 0.0)
    assert chunks_asked(fetch.plan(0.0), "a") == {0, 1}


def test_two_who_fetch_the_same_ask_for_different_chunks() -> None:
    orders = []
    for seed in range(2):
        fetch = download(seed=seed)
        fetch.heard("seed", {BLOCK: everything(CHUNKS)}, 0.0)
        orders.append(chunks_asked(fetch.plan(0.0), "seed"))
    assert orders[0] != orders[1]


def test_whoever_has_everything_is_spared() -> None:
    fetch = download()
    fetch.heard("seed", {BLOCK: everything(CHUNKS)}, 0.0)
    fetch.heard("b", {BLOCK: pack([4], CHUNKS)}, 0.0)
    assert chunks_asked(fetch.plan(0.0), "b") == {4}


def test_the_faster_peer_sends_more() -> None:
    fetch = download(200)
    for peer_id in ("fast", "slow"):
        fetch.heard(peer_id, {BLOCK: everything(200)}, 0.0)
    run(fetch, {"fast": 2e7, "slow": 2e6})
    assert fetch.received["fast"] > 4 * fetch.received["slow"]


def test_no_peer_is_asked_for_very_much_at_once() -> None:
    fetch = download(1000)
    fetch.heard("a", {BLOCK: everything(1000)}, 0.0)
    for ask in fetch.plan(0.0):
        fetch.arrived("a", ask.shard, ask.chunk, 0.0001)
    assert len(fetch.plan(0.0001)) == MAX_WINDOW


def test_a_peer_is_asked_for_several_at_once_when_part_of_its_window_is_free() -> None:
    fetch = download(1000)
    fetch.heard("a", {BLOCK: everything(1000)}, 0.0)
    for ask in fetch.plan(0.0):
        fetch.arrived("a", ask.shard, ask.chunk, 0.0001)
    asked, answered = fetch.plan(0.0001), 0
    while not (more := fetch.plan(0.0001)):
        fetch.arrived("a", asked[answered].shard, asked[answered].chunk, 0.0002)
        answered += 1
    assert len(more) == answered == MAX_WINDOW * (1 - REFILL)


def test_more_chunks_than_are_put_in_order_at_a_time() -> None:
    fetch = download(2 * FRONTIER + 7)
    fetch.heard("a", {BLOCK: everything(2 * FRONTIER + 7)}, 0.0)
    assert run(fetch, {"a": 1e9}, step=0.001) < 1


def test_what_a_peer_was_asked_for_is_asked_elsewhere_when_it_goes() -> None:
    fetch = download(2)
    for peer_id in "ab":
        fetch.heard(peer_id, {BLOCK: everything(2)}, 0.0)
    first = fetch.plan(0.0)
    assert chunks_asked(first, "a") | chunks_asked(first, "b") == {0, 1}
    fetch.left_peer("a")
    fetch.left_peer("nobody")
    assert chunks_asked(fetch.plan(0.0), "b") == chunks_asked(first, "a")
    assert not fetch.expects("a", BLOCK, 0)


def test_a_liar_is_never_asked_again() -> None:
    fetch = download()
    fetch.heard("a", {BLOCK: everything(CHUNKS)}, 0.0)
    fetch.plan(0.0)
    fetch.lied("a")
    fetch.heard("a", {BLOCK: everything(CHUNKS)}, 1.0)
    assert fetch.plan(1.0) == []
    assert not fetch.usable("a")
    assert fetch.left == CHUNKS * MIN_CHUNK


def test_a_peer_that_lacks_what_it_said_it_had_is_not_asked_for_it_again() -> None:
    fetch = download(1)
    fetch.heard("a", {BLOCK: everything(1)}, 0.0)
    assert fetch.plan(0.0) == [Ask("a", BLOCK, 0)]
    assert fetch.expects("a", BLOCK, 0)
    assert fetch.lacked("a", BLOCK, 0)
    assert not fetch.lacked("a", BLOCK, 0)
    assert fetch.plan(REORDER_SECONDS) == []
    assert fetch.unheld() == [(BLOCK, 0)]


def test_an_idle_peer_helps_with_what_another_does_not_send() -> None:
    fetch = download(1)
    fetch.heard("a", {BLOCK: everything(1)}, 0.0)
    fetch.plan(0.0)
    fetch.heard("b", {BLOCK: everything(1)}, 0.0)
    assert fetch.plan(STALE_SECONDS) == []
    assert fetch.plan(STALE_SECONDS + 1) == [Ask("b", BLOCK, 0)]
    assert fetch.plan(STALE_SECONDS + 9) == [], "two at most"
    assert fetch.arrived("b", BLOCK, 0, 4.0)
    assert fetch.done
    assert not fetch.arrived("a", BLOCK, 0, 5.0), "the second of two"
    assert not fetch.arrived("c", BLOCK, 0, 5.0), "of one who is gone"
    assert fetch.received == {"b": MIN_CHUNK}


def test_a_peer_that_sends_nothing_has_failed() -> None:
    fetch = download()
    fetch.heard("a", {BLOCK: everything(CHUNKS)}, 0.0)
    fetch.heard("b", {}, 0.0)
    fetch.plan(50.0)
    assert fetch.overdue(50.0 + PATIENCE) == []
    assert fetch.overdue(50.0 + PATIENCE + 3) == ["a"]


def test_chunks_that_come_from_elsewhere_need_not_be_asked_for() -> None:
    fetch = download(2)
    assert fetch.take(BLOCK, 0)
    assert not fetch.take(BLOCK, 0)
    assert not fetch.take(ENDS, 0)
    fetch.heard("a", {BLOCK: everything(2)}, 0.0)
    assert fetch.plan(0.0) == [Ask("a", BLOCK, 1)]
    fetch.take(BLOCK, 1)
    fetch.heard("b", {BLOCK: everything(2)}, 9.0)
    assert fetch.plan(9.0) == []


def test_four_who_fetch_at_once_spare_the_seed() -> None:
    """Each has all that it has got so far for the others; the seed is as slow as any of them."""
    chunks, peers = 60, "abcd"
    fetches = {peer: download(chunks, seed=ord(peer)) for peer in peers}
    got: dict[str, set[int]] = {peer: set() for peer in peers}
    served: Counter[str] = Counter()
    now = 0.0
    queues: dict[str, list[tuple[str, Ask]]] = {peer: [] for peer in (*peers, "seed")}
    while any(not fetch.done for fetch in fetches.values()):
        for peer, fetch in fetches.items():
            fetch.heard("seed", {BLOCK: everything(chunks)}, now)
            for other in peers:
                if other != peer:
                    fetch.heard(other, {BLOCK: pack(got[other], chunks)}, now)
            for ask in fetch.plan(now):
                queues[ask.peer_id].append((peer, ask))
        now += 0.6
        for holder, queue in queues.items():
            for peer, ask in queue[:2]:
                served[holder] += fetches[peer].arrived(holder, ask.shard, ask.chunk, now)
                got[peer].add(ask.chunk)
            del queue[:2]
    assert served["seed"] < 2 * chunks
    assert min(served[peer] for peer in peers) > 0
