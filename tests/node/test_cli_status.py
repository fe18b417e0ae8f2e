"""What ``status`` makes of announcements, and how it looks."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from petals.node import summary
from petals.node.cli import status, status_view
from petals.protocol.announcement import Announcement, PeerState
from petals.protocol.span import Span
from rich.console import Console


def announcement(
    peer_id: str,
    span: Span | None,
    state: PeerState = PeerState.ONLINE,
    model: str = "ab" * 16,
    **changes: Any,
) -> Announcement:
    usual = Announcement(
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
    return replace(usual, **changes)


def shown(models: Sequence[dict[str, Any]], width: int = 80, *, colour: bool = False) -> str:
    """The picture on a terminal of that width."""
    console = Console(file=io.StringIO(), width=width, force_terminal=colour)
    console.print(status_view.picture(models, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_whole_model() -> None:
    (model,) = summary.summarise(
        [announcement("bbb", Span(1, 4)), announcement("aaa", Span(0, 2))],
    )
    assert model["coverage"] == [1, 2, 1, 1]
    assert model["missing"] == []
    assert [peer["peer_id"] for peer in model["peers"]] == ["aaa", "bbb"]
    assert model["peers"][0]["blocks"] == [0, 2]
    assert model["throughput"] == pytest.approx([50, 50 + 100 / 3, 100 / 3, 100 / 3])
    assert json.loads(json.dumps(model)) == model
    assert status_view.headline(model) == (
        "demo (abababab): 4 blocks, every block served at least 1×, up to 33.3 tokens/s"
    )


def test_only_who_is_online_covers() -> None:
    (model,) = summary.summarise(
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
    assert "cannot run: nobody serves blocks 2:4" in status_view.headline(model)


def test_another_fingerprint_is_another_model() -> None:
    models = summary.summarise(
        [announcement("aaa", Span(0, 4)), announcement("bbb", Span(0, 1), model="cd" * 16)],
    )
    assert [model["fingerprint"][:2] for model in models] == ["ab", "cd"]


def test_nobody() -> None:
    assert summary.summarise([]) == []


def test_the_keys_are_those_of_the_readme() -> None:
    (model,) = summary.summarise([announcement("aaa", Span(0, 4))])
    assert [*model] == [
        "model", "fingerprint", "num_blocks", "coverage", "missing", "throughput", "peers",
    ]  # fmt: skip
    assert [*model["peers"][0]] == [
        "peer_id", "public_name", "multiaddrs", "reachability", "blocks", "state", "dtype",
        "decode_speed", "prefill_speed", "sessions", "session_blocks", "cache_tokens_left",
        "version",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("multiaddrs", "word"),
    [
        (("/ip4/1.2.3.4/tcp/1",), "direct"),
        (("/ip4/1.2.3.4/tcp/1/p2p/R/p2p-circuit",), "relayed"),
        (("/ip4/1.2.3.4/tcp/1/p2p/R/p2p-circuit", "/ip4/1.2.3.4/tcp/2"), "direct"),
        ((), "none"),
    ],
)
def test_a_node_with_nothing_but_relays_is_relayed(multiaddrs: tuple[str, ...], word: str) -> None:
    assert summary.reachability(multiaddrs) == word


SWARM = [
    announcement(
        "12D3KooW" + "x" * 36 + "abcdefgh", Span(0, 4), decode_speed=612.4, prefill_speed=14567.0
    ),
    announcement(
        "12D3KooW" + "y" * 36 + "ijklmnop",
        Span(1, 4),
        dtype="bfloat16",
        decode_speed=0.0,
        cache_tokens_left=184_221,
        public_name=None,
        multiaddrs=("/ip4/1.2.3.4/tcp/1/p2p/R/p2p-circuit",),
    ),
    announcement("12D3KooW" + "z" * 36 + "qrstuvwx", None, PeerState.JOINING),
]

NARROW = """\
demo (abababab): 4 blocks, every block served at least 1×, up to 153 tokens/s
blocks    0
nodes     1222
tokens/s  ▇███
          ▁–█ up to 186 tokens/s

node      name      blocks type     tok/s sessions cache version state   reach
────────────────────────────────────────────────────────────────────────────────
…abcdefgh [bold]Bob    0:4 float32    612        2  4096 0.1.0   online  direct
…ijklmnop              1:4 bfloat16     -        2  184k 0.1.0   online  relayed
…qrstuvwx [bold]Bob      - float32    100        2  4096 0.1.0   joining direct
"""


def test_the_picture_fits_80_columns_and_takes_names_literally() -> None:
    lines = shown(summary.summarise(SWARM)).splitlines()
    assert [line.rstrip() for line in lines] == NARROW.splitlines()


def test_colours_say_nothing_that_is_not_said_without(monkeypatch: pytest.MonkeyPatch) -> None:
    models = summary.summarise(SWARM)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in shown(models, colour=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in shown(models, colour=True)


def test_more_columns_show_more() -> None:
    wide = shown(summary.summarise(SWARM), 120)
    assert "prefill" in wide
    assert "14.6k" in wide


def test_a_gap_is_seen_in_the_bar() -> None:
    picture = shown(summary.summarise([announcement("aaa", Span(1, 3))]))
    assert "nodes     0110" in picture
    assert "tokens/s   ██" in picture
    assert "cannot run: nobody serves blocks 0:1, 3:4" in picture


def test_of_blocks_that_share_a_character_the_weakest_counts() -> None:
    peers = [
        announcement("aaa", Span(0, 280), num_blocks=280),
        announcement("bbb", Span(0, 277), num_blocks=280),
        *(announcement(str(number), Span(0, 4), num_blocks=280) for number in range(10)),
    ]
    lines = shown(summary.summarise(peers)).splitlines()
    assert "0       32      64" in lines[1 + ("blocks " not in lines[1])]
    (nodes,) = (line for line in lines if line.startswith("nodes"))
    assert nodes == "nodes     +" + 68 * "2" + "1"
    assert all(len(line) <= 80 for line in lines)
    assert "a character is 4 blocks" in " ".join(lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "-"), (0.34, "0.3"), (25.84, "25.8"), (99.96, "100"), (999.4, "999"), (999.6, "1.0k"),
     (14567, "14.6k"), (184221, "184k"), (5e6, "5.0M"), (1e12, "1.0T"), (1e15, "1000T")],
)  # fmt: skip
def test_figures_are_short(value: float, text: str) -> None:
    assert status_view.figure(value) == text


def test_a_pipe_gets_no_control_codes_and_all_columns(capsys: pytest.CaptureFixture[str]) -> None:
    status._write_picture(summary.summarise(SWARM))
    written = capsys.readouterr().out
    assert "\x1b" not in written
    assert "14.6k" in written


def test_two_models_are_one_below_the_other() -> None:
    other = announcement("bbb", Span(0, 1), model="cd" * 16)
    picture = shown(summary.summarise([announcement("aaa", Span(0, 4)), other]))
    assert picture.count("node ") == 2
    assert picture.index("(abababab)") < picture.index("(cdcdcdcd)")


def test_it_says_when_there_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    status._write_picture([])
    assert capsys.readouterr().out == "No peer serves a model here.\n"


def test_watching_into_a_pipe_writes_what_has_changed(capsys: pytest.CaptureFixture[str]) -> None:
    changes = status._Changes(status._write_json)
    for models in (SWARM[:1], SWARM[:1], SWARM[:2]):
        changes.show(summary.summarise(models), None)
    changes.show(summary.summarise(SWARM[:2]), "nobody answers")
    changes.show(summary.summarise(SWARM[:2]), "nobody answers")
    written = capsys.readouterr()
    lines = [json.loads(line) for line in written.out.splitlines()]
    assert [len(line["models"][0]["peers"]) for line in lines] == [1, 2]
    assert written.err == "nobody answers\n"
