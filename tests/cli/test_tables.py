"""Tables of the command line: numbers stay whole, words go on below themselves."""

import io

import pytest
from rich.console import Console

from fp4rl.cli.main import VERBS, main
from fp4rl.cli.terminal import table


@pytest.mark.parametrize("lines", [True, False])
def test_numbers_and_ids_stay_whole_where_a_table_is_too_wide(lines):
    rows = [("w4a16-s0-0123456789ab", "words that go on and on, below themselves", "12.345")]
    screen = Console(file=io.StringIO(), width=48)
    screen.print(table("run=", "what", "value>", rows=rows, lines=lines))
    shown = screen.file.getvalue()
    assert rows[0][0] in shown
    assert rows[0][2] in shown
    assert rows[0][1] not in shown
    assert all(len(line) <= 48 for line in shown.splitlines())


def test_a_table_without_headings_shows_none():
    screen = Console(file=io.StringIO(), width=48)
    screen.print(table("=", "", rows=[("a", "b")]))
    assert screen.file.getvalue().split() == ["a", "b"]


NAME = "w4a8-with-a-name-that-says-everything-about-it-s0-0123456789ab"


@pytest.mark.parametrize("width", [64, 80, 100, 140])
@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("columns", [("run=", "arm", "steps>", "what"), ("arm", "run", "n>", "accuracy %=")])
def test_every_word_is_whole_and_no_line_too_long_at_every_width(width, lines, columns):
    rows = [
        (NAME, "compressed_tensors", "12,345", "words that go on and on, below themselves, for a while, as they may"),
        ("bf16", NAME, "1", "[v1] :x:"),
        ("bf16", "vllm_ascend", "", ""),
    ]
    if columns[3].endswith("="):
        rows = [(*row[:3], "full 91.5\ndeployment 87.5") for row in rows]
    screen = Console(file=io.StringIO(), width=width)
    made = table(*columns, rows=rows, lines=lines, title="a title", caption="what is below")
    screen.print(made)
    shown = screen.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    words = {word.rstrip(";,") for word in shown.replace("│", " ").replace("┃", " ").split()}
    assert {word.rstrip(",") for row in rows for cell in row for word in cell.split()} <= words
    assert shown.startswith("a title")
    assert shown.rstrip().endswith("what is below")


def test_a_table_is_laid_out_anew_at_each_width():
    made = table("run=", "what", rows=[("w4a4-s0", "some words that wrap below themselves where there is no room")])
    for width in (30, 100):
        screen = Console(file=io.StringIO(), width=width)
        screen.print(made)
    assert "some words that wrap below themselves where there is no room" in screen.file.getvalue()


def test_rows_that_do_not_fit_side_by_side_are_stacked_below_their_names():
    rows = [(NAME, "30", "full 91.5\nw4a8 87.5"), ("bf16-s0", "", "-")]
    screen = Console(file=io.StringIO(), width=80)
    screen.print(table("run=", "steps>", "accuracy %=", rows=rows, lines=True))
    assert [text.rstrip() for text in screen.file.getvalue().splitlines()] == [
        NAME,
        "  steps 30; accuracy % full 91.5, w4a8 87.5",
        "bf16-s0",
        "  accuracy % -",
    ]


def test_the_first_screen_says_what_to_do_next_in_ten_lines(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 80
    shown = [text.split()[1] for text in lines if text.startswith("  fp4rl ")]
    assert shown == ["quickstart", "new", "plan", "run", "report", "doctor"]
    assert set(shown) <= set(VERBS)


def test_an_address_in_a_help_stays_whole_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    main(["plan", "--help"])
    assert "…" not in capsys.readouterr().out
