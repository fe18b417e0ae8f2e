"""Rows as tables, JSON, Markdown and pictures."""

import io
import json
from pathlib import Path

import pytest
from bench_parts.report import Aim, Curve, Picture, Report, Row, header, number
from rich.console import Console


@pytest.fixture
def report() -> Report:
    return Report("engine", Console(file=io.StringIO()))


def text_of(report: Report) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(report.table())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_json_has_exactly_the_five_keys(report: Report) -> None:
    report.add(Row("decode", 12.5, "tokens/s", "transformers: 5", 2.5, Aim(at_least=2.0)))
    report.add(Row("size", 4.9, "GB"))
    assert json.loads(report.json()) == [
        {
            "name": "decode",
            "value": 12.5,
            "unit": "tokens/s",
            "against": "transformers: 5",
            "ratio": 2.5,
        },
        {"name": "size", "value": 4.9, "unit": "GB", "against": "", "ratio": None},
    ]


@pytest.mark.parametrize(
    ("aim", "ratio", "mark"),
    [
        (Aim(at_least=0.8), 0.8, "≥ 0.8 ✓"),
        (Aim(at_least=0.8), 0.79, "≥ 0.8 ✗"),
        (Aim(at_most=1.15), 1.15, "≤ 1.15 ✓"),
        (Aim(at_most=1.15), 1.2, "≤ 1.15 ✗"),
    ],
)
def test_a_row_says_whether_its_aim_is_met(
    report: Report, aim: Aim, ratio: float, mark: str
) -> None:
    report.add(Row("a figure", 1.0, "s", "a rival: 2", ratio, aim))
    assert mark in text_of(report)
    assert mark in report.markdown()


def test_a_row_without_an_aim_has_no_mark(report: Report) -> None:
    report.add(Row("a figure", 1.0, "s", "a rival: 2", 2.0))
    assert not set("✓✗") & set(text_of(report))


def test_being_ahead_is_our_figure_by_the_rivals(report: Report) -> None:
    report.ahead("text", 30.0, "tokens/s", "transformers", 12.0, 2.0)
    (row,) = report.rows
    assert (row.ratio, row.met, row.against) == (2.5, True, "transformers: 12")


def test_what_looks_like_markup_is_shown_as_it_is(report: Report) -> None:
    report.add(Row("rows [1, 2]", 1.0, "[red]", "[bold]"))
    assert all(shown in text_of(report) for shown in ("rows [1, 2]", "[red]", "[bold]"))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (16, "16"),
        (12345, "12,345"),
        (1234.56, "1,235"),
        (12.345678, "12.35"),
        (0.0123456, "0.01235"),
        (0.000012, "1.20e-05"),
    ],
)
def test_numbers_have_four_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_pictures_are_drawn_and_png(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = [Curve("560m", {1: 10.0, 16: 60.0}), Curve("560m", {1: 20.0, 16: 90.0}, bound=True)]
    report.pictures.append(Picture("p.png", "Throughput", "sessions", "tokens/s", curves))
    (path,) = report.draw(tmp_path / "new" / "folder")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_header_says_what_was_measured_with() -> None:
    assert "memory bandwidth 25.5 GB/s" in header(25.5e9)
    assert "torch" in header(None)
