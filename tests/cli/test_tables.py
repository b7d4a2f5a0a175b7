"""Tables of the command line: numbers stay whole, words go on below themselves."""

import io

import pytest
from rich.console import Console

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
