"""Whole conversations, as text beside the tests.

In ``tests/transcripts/*.txt`` a line ``> command`` is what somebody does (``Conversation.do`` knows
the commands) and the indented lines below it are all that happens then. After a change on purpose,
``UPDATE_TRANSCRIPTS=1 pytest tests/protocol/test_transcripts.py`` writes them anew: read the diff.
"""

import os
from pathlib import Path

import pytest
from support.conversation import Conversation

TRANSCRIPTS = sorted((Path(__file__).parent.parent / "transcripts").glob("*.txt"))


def replay(transcript: str) -> str:
    """The transcript with what happens now below its commands."""
    conversation = Conversation()
    lines: list[str] = []
    try:
        for line in transcript.splitlines():
            if line.startswith("  "):
                continue
            lines.append(line)
            if line.startswith("> "):
                lines += [f"  {happened}" for happened in conversation.do(line.removeprefix("> "))]
    finally:
        conversation.end()
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_a_conversation_goes_as_it_is_written(path: Path) -> None:
    written = path.read_text()
    happened = replay(written)
    if os.environ.get("UPDATE_TRANSCRIPTS"):
        path.write_text(happened)
        pytest.skip("written anew")
    assert happened.splitlines() == written.splitlines()


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) >= 4
