"""What ``status`` makes of announcements."""

import json

import pytest
from petals.node.cli import status
from petals.protocol.announcement import Announcement, PeerState
from petals.protocol.span import Span


def announcement(
    peer_id: str, span: Span | None, state: PeerState = PeerState.ONLINE, model: str = "ab" * 16
) -> Announcement:
    return Announcement(
        peer_id=peer_id,
        multiaddrs=("/ip4/127.0.0.1/tcp/1",),
        model=model,
        model_name="demo",
        num_blocks=4,
        span=span,
        state=state,
        dtype="float32",
        decode_speed=100.0,
        prefill_speed=0.0,
        cache_tokens_left=4096,
        sessions=2,
        version="0.1.0",
        sequence=1,
        expires_at=60.0,
        public_name="[bold]Bob",
    )


def test_a_whole_model() -> None:
    (model,) = status.summarise(
        [announcement("bbb", Span(1, 4)), announcement("aaa", Span(0, 2))],
    )
    assert model["coverage"] == [1, 2, 1, 1]
    assert model["missing"] == []
    assert [peer["peer_id"] for peer in model["peers"]] == ["aaa", "bbb"]
    assert model["peers"][0]["blocks"] == [0, 2]
    assert json.loads(json.dumps(model)) == model
    assert "every block served at least 1×" in status.headline(model)


def test_only_who_is_online_covers() -> None:
    (model,) = status.summarise(
        [
            announcement("aaa", Span(0, 2)),
            announcement("bbb", Span(2, 4), PeerState.JOINING),
            announcement("ccc", None),
        ],
    )
    assert model["coverage"] == [1, 1, 0, 0]
    assert model["missing"] == [[2, 4]]
    assert model["peers"][1]["state"] == "joining"
    assert model["peers"][2]["blocks"] is None
    assert "cannot run: nobody serves blocks 2:4" in status.headline(model)


def test_another_fingerprint_is_another_model() -> None:
    models = status.summarise(
        [announcement("aaa", Span(0, 4)), announcement("bbb", Span(0, 1), model="cd" * 16)],
    )
    assert [model["fingerprint"][:2] for model in models] == ["ab", "cd"]


def test_nobody() -> None:
    assert status.summarise([]) == []


def test_the_table_shows_figures_and_takes_names_literally(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status.show(status.summarise([announcement("12D3KooW" + "x" * 36 + "abcdefgh", Span(0, 4))]))
    shown = capsys.readouterr().out
    for part in ("…abcdefgh", "[bold]Bob", "online", "0:4", "100.0", "not measured", "4096"):
        assert part in shown


def test_the_table_says_when_there_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    status.show([])
    assert capsys.readouterr().out == "No peer serves a model here.\n"
