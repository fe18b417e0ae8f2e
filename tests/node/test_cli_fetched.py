"""What is said of weights that came from peers."""

from petals.inference.progress import Step
from petals.node.cli.fetched import fetched_event
from petals.node.cli.run import in_words
from petals.node.shard_fetch import Fetching


def test_who_gave_what_is_told_in_bytes_and_words() -> None:
    peer, other = "12D3KooWabcdefgh", "12D3KooWijklmnop"
    files = Fetching("files", 1_000_000, 1_000_000, 1_000_000)
    blocks = Fetching(
        "blocks", 9_000_000, 500_000, 9_000_000, received={peer: 6_000_000, "": 2_500_000}
    )
    ends = Fetching("ends", 2_000_000, 0, 2_000_000, received={other: 2_000_000})
    event = fetched_event([files, blocks, ends])
    assert event == {
        "event": "fetched",
        "bytes": 12_000_000,
        "kept": 1_500_000,
        "from": {peer: 6_000_000, "fallback": 2_500_000, other: 2_000_000},
    }
    assert in_words(event) == (
        "Has 12.0 MB of weights and files: 6.0 MB from …abcdefgh, 2.5 MB from the fallback, "
        "2.0 MB from …ijklmnop; 1.5 MB were on the disk"
    )


def test_whoever_looks_is_told_what_has_come() -> None:
    told: list[Step] = []
    fetching = Fetching("blocks", 9, 1, 1, told.append)
    fetching.tell()
    fetching.came(3, "a peer")
    fetching.came(5, "")
    assert told == [Step("fetching blocks", done, 9, "bytes") for done in (1, 4, 9)]
    assert fetching.received == {"a peer": 3, "": 5}


def test_a_seed_says_how_others_get_the_model() -> None:
    event = {
        "event": "seeding",
        "peer_id": "12D3",
        "multiaddr": "/ip4/1.2.3.4/tcp/5/p2p/12D3",
        "model": "mine",
        "fingerprint": "ab" * 32,
        "bytes": 15_000_000,
    }
    assert in_words(event) == (
        "Giving mine (15.0 MB) to whoever asks. Others serve it with\n"
        f"  petals-node run --model petals:{'ab' * 32} --bootstrap /ip4/1.2.3.4/tcp/5/p2p/12D3"
    )
    assert in_words(event | {"multiaddr": None}).endswith(f"petals:{'ab' * 32}")
