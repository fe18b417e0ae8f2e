"""What generate and chat say and check around a session."""

from pathlib import Path
from typing import Any

import pytest
from petals.inference.sampling_params import SamplerState, SamplingParams
from petals.node import saved_session
from petals.node.cli import generate, originator
from petals.node.cli.app import run_command_line
from petals.node.saved_session import SavedSession, Writing
from petals.protocol.errors import ConfigError
from petals.protocol.tensor import DType

PARAMS = SamplingParams(max_new_tokens=9, temperature=0.8, seed=7, stop=("\n",))
SAVED = SavedSession(
    model="a/model",
    fingerprint="f00d",
    wire_dtype=DType.BFLOAT16,
    max_tokens=12,
    padding=(0,),
    token_ids=((1, 2, 3),),
    writing=Writing(3, PARAMS, SamplerState((False,))),
)
PEER = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWRqgvzVyfTYV6hvYWYsLnrvYi7NJwFoGkHQY1EpsYUhsN"


def test_a_long_wait_is_told_once_and_so_is_its_end() -> None:
    teller = originator.WaitTeller(patience=120)
    said = [
        teller.look(reason, now)
        for now, reason in [
            (0.0, None),
            (0.5, "nobody serves 3:5"),
            (1.0, "nobody serves 3:5"),
            (2.5, "nobody serves 3:5"),
            (3.0, "nobody serves 3:4"),
            (9.5, None),
            (10.0, None),
        ]
    ]
    told, ended = "Waiting, for 120 s at most: nobody serves 3:5", "Going on, after 9 s."
    assert said == [None, None, None, told, None, ended, None]


def test_a_short_wait_is_not_told() -> None:
    teller = originator.WaitTeller(patience=120)
    looks = [(0.0, "gap"), (1.9, "gap"), (2.4, None), (3.0, "gap"), (4.9, "gap"), (5.0, None)]
    assert [teller.look(reason, now) for now, reason in looks] == [None] * len(looks)


def test_a_file_that_is_not_there_yet_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert originator.load_if_there(None) is None
    assert originator.load_if_there(tmp_path / "session") is None


def test_several_texts_are_for_programs(tmp_path: Path) -> None:
    batch = SavedSession("demo", "f00d", DType.FLOAT32, 9, (0, 0), ((1,), (2,)), None)
    saved_session.save(tmp_path / "session", batch)
    with pytest.raises(ConfigError, match="holds 2 texts"):
        originator.load_if_there(tmp_path / "session")


def test_what_is_not_given_is_as_it_was() -> None:
    assert originator.chosen_model(None, None) == "demo"
    assert originator.chosen_model(None, SAVED) == "a/model"
    assert originator.chosen_model("./copy", SAVED) == "./copy"
    assert originator.chosen_wire_dtype("int8", None) == "int8"
    assert originator.chosen_wire_dtype("bfloat16", SAVED) == "bfloat16"
    given: dict[str, Any] = {"temperature": None, "seed": 7, "stop": ["\n"]}
    assert originator.params_of_one_text(SAVED, **given) == PARAMS
    assert originator.params_of_one_text(None, **given) == SamplingParams(seed=7, stop=("\n",))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"temperature": 0.7}, "--temperature: 0.7 contradicts .* begun with 0.8"),
        ({"max_new_tokens": 5}, "--max-new-tokens: 5 contradicts"),
        ({"stop": ["x"]}, "--stop"),
    ],
)
def test_a_text_goes_on_as_it_was_begun(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        originator.params_of_one_text(SAVED, **given)


def test_the_next_turn_may_be_sampled_otherwise() -> None:
    changed = originator.params_of_next_turns(SAVED, temperature=0.5, seed=None, stop=None)
    assert (changed.temperature, changed.seed, changed.stop) == (0.5, 7, ("\n",))
    assert originator.params_of_next_turns(None, temperature=0.5) == SamplingParams(temperature=0.5)


def test_states_travel_as_they_did() -> None:
    with pytest.raises(ConfigError, match=r"--wire-dtype: float32 contradicts .* bfloat16"):
        originator.chosen_wire_dtype("float32", SAVED)


@pytest.mark.parametrize(
    ("prompt", "file", "saved", "complaint"),
    [
        (None, None, None, "write at least one"),
        ("", None, None, "write at least one"),
        ("", Path("f"), SAVED, "write at least one"),
        (None, Path("f"), None, "there is no file f to go on from"),
    ],
)
def test_something_must_be_there_to_go_on_from(
    prompt: str | None, file: Path | None, saved: SavedSession | None, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^PROMPT: .*{complaint}"):
        generate.check_prompt(prompt, file, saved)


def test_a_prompt_or_a_file_is_enough() -> None:
    generate.check_prompt("x", None, None)
    generate.check_prompt(None, Path("f"), SAVED)
    generate.check_prompt("x", Path("f"), SAVED)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_file_that_is_no_session(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes"
    path.write_text("no session")
    assert run_command_line([command, "--bootstrap", PEER, "--resume", str(path)]) == 2
    assert "notes: this is no saved session" in capsys.readouterr().err
    assert path.read_text() == "no session"
