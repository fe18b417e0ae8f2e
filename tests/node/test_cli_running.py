"""One node for one data directory, and who that is."""

import os
from pathlib import Path

import pytest
from petals.node.cli.running import PID_FILE, running_in, running_process
from petals.protocol.errors import ConfigError


def test_the_process_of_a_data_directory_is_known_while_it_runs(tmp_path: Path) -> None:
    with running_in(tmp_path):
        assert running_process(tmp_path) == os.getpid()
    assert running_process(tmp_path) is None


def test_a_second_node_in_one_data_directory_is_told_of_the_first(tmp_path: Path) -> None:
    with running_in(tmp_path):
        with (
            pytest.raises(ConfigError, match=rf"already \(process {os.getpid()}\)"),
            running_in(tmp_path),
        ):
            raise AssertionError("two nodes in one folder")
        assert running_process(tmp_path) == os.getpid()
    with running_in(tmp_path):
        pass


def test_what_a_killed_node_left_behind_is_nobody(tmp_path: Path) -> None:
    (tmp_path / PID_FILE).write_text("1")
    assert running_process(tmp_path) is None
    assert running_process(tmp_path / "nowhere") is None


def test_a_node_that_is_just_starting_is_no_wrong_process(tmp_path: Path) -> None:
    with running_in(tmp_path):
        (tmp_path / PID_FILE).write_text("")
        with pytest.raises(ConfigError, match="just starting"):
            running_process(tmp_path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / PID_FILE).mkdir()
    with pytest.raises(ConfigError, match=PID_FILE), running_in(tmp_path):
        raise AssertionError("a folder is no file")
