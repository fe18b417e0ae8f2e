"""A private swarm of real processes, and those who are kept out of it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from petals.inference.sampling_params import SamplingParams
from petals.node.identity import load_identity
from petals.node.private import make_swarm_key
from support.forked import ForkedProcess
from support.processes import CommandProcess, ServingNode, environment
from support.reference import ReferenceModel

PROMPT = "And God said, Let there be"
TOKENS = 8
SOON = 20.0
"""Seconds in which a stranger is told so: most of it is starting."""


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[ServingNode]:
    node = ServingNode(folder, "--model", "demo", "--blocks", "0:8", *options)
    with node:
        node.wait_serving()
        yield node


def refused(command: str, *options: str) -> str:
    """What the command complains of; it must not take long to."""
    code, output, errors = ForkedProcess([command, *options], environment()).communicate("", SOON)
    assert code != 0, output
    assert not output
    assert "Traceback" not in errors
    return errors


def text_through(node: ServingNode, *options: str) -> list[int]:
    command = ("generate", "--json", "--model", "demo", "--max-new-tokens", str(TOKENS))
    with CommandProcess(*command, "--bootstrap", node.multiaddr, *options, "--", PROMPT) as process:
        assert process.wait() == 0, process.errors
        ids: list[int] = json.loads(process.lines[-1])["token_ids"]
        return ids


def check_shut_out(node: ServingNode, folder: Path, words: str, *options: str) -> None:
    """Who comes with these options can neither join the swarm, nor list it, nor use it."""
    known = ("--bootstrap", node.multiaddr, *options)
    data = ("--data-dir", str(folder))
    joining = ("--listen", "/ip4/127.0.0.1/tcp/0", "--model", "demo", "--blocks", "0:1", *data)
    assert words in refused("run", *joining, *known)
    assert words in refused("status", *known)
    assert words in refused("generate", "--model", "demo", *known, "--", PROMPT)


@pytest.mark.parametrize("theirs", ["another", "none"])
def test_without_the_key_nobody_joins_lists_or_uses_the_swarm(
    demo: ReferenceModel, tmp_path: Path, theirs: str
) -> None:
    key, other = tmp_path / "swarm.key", tmp_path / "other.key"
    make_swarm_key(key)
    make_swarm_key(other)
    options = {"another": ("--swarm-key", str(other)), "none": ()}[theirs]
    words = {"another": "wrong swarm key?", "none": "--swarm-key"}[theirs]
    with serving(tmp_path / "node", "--swarm-key", str(key)) as node:
        check_shut_out(node, tmp_path / "stranger", words, *options)
        [expected] = demo.generate((PROMPT,), SamplingParams(max_new_tokens=TOKENS))
        assert text_through(node, "--swarm-key", str(key)) == expected


def test_who_is_not_on_the_list_neither_joins_lists_nor_uses_the_swarm(
    demo: ReferenceModel, tmp_path: Path
) -> None:
    friend_folder = tmp_path / "friend"
    friend_folder.mkdir()
    friend = load_identity(friend_folder / "identity.pem").peer_id
    allowed = tmp_path / "allowed"
    allowed.write_text(f"{friend}  # ours\n")
    with serving(tmp_path / "node", "--allow-peers", str(allowed)) as node:
        check_shut_out(node, tmp_path / "stranger", "a list that we are not on")
        # who is on the list joins, and serves others of its own
        with serving(friend_folder, "--bootstrap", node.multiaddr) as other:
            assert other.peer_id == friend
            [expected] = demo.generate((PROMPT,), SamplingParams(max_new_tokens=TOKENS))
            assert text_through(other) == expected
