"""The tables of the command line, so that those of all verbs read alike."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

_MANY = 6  # columns from which on one space stands between them, so that 80 columns of text hold them


def table(
    *columns: str,
    rows: Iterable[Sequence[str | Text]] = (),
    title: str | None = None,
    caption: str | None = None,
    lines: bool = False,
) -> Table:
    """Return a table of `rows`, with `lines` around its cells or without; no headings where all are empty.

    A column is its heading and how it behaves: `steps>` is right and never broken (numbers), `run=` is left and never
    broken (what is copied), and any other is left and goes on below itself.
    """
    made = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.HEAVY_HEAD if lines else None,
        pad_edge=lines,
        padding=(0, 1) if lines else (0, 2 if len(columns) < _MANY else 1, 0, 0),
        show_header=any(column.strip("=>") for column in columns),
    )
    for column in columns:
        made.add_column(
            column.rstrip("=>"),
            justify="right" if column.endswith(">") else "left",
            no_wrap=column.endswith(("=", ">")),
            overflow="fold",
        )
    for row in rows:
        made.add_row(*row)
    return made
