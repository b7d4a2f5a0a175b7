"""Tables that cut no word: columns wrap between words, and rows are stacked where these do not fit side by side."""

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


class WholeWords(Table):
    """A table of strings and `Text` whose names, numbers and ids stay whole at every width that holds them alone."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the columns out, or stack each row: the longest name, and below it what the other columns say of it."""
        if self._fits(options.max_width):
            yield from super().__rich_console__(console, options)
        else:
            yield from self._stacked()

    def _fits(self, width: int) -> bool:
        """Give each column its longest word, and what is left to those that want more; False where words are cut."""
        for column in self.columns:
            column.width = None
        natural = [max(map(_widest, self._cells(n)), default=0) for n in range(len(self.columns))]
        least = [
            wanted if column.no_wrap else max(map(_longest_word, self._cells(n)), default=0)
            for n, (column, wanted) in enumerate(zip(self.columns, natural, strict=True))
        ]
        room = width - self._around()
        if sum(natural) <= room:
            return True
        spare = room - sum(least)
        if spare < 0:
            return False
        wanting = sum(natural) - sum(least)  # more than `spare`, which is all that there is
        for column, low, high in zip(self.columns, least, natural, strict=True):
            column.width = low + spare * (high - low) // wanting
        return True

    def _around(self) -> int:
        """Return the cells that borders and paddings take."""
        _, right, _, left = self.padding
        count = len(self.columns)
        if self.box is not None:
            return count * (left + right) + count + 1
        return (count - (0 if self.pad_edge else 1)) * (left + right)

    def _cells(self, number: int) -> list[Text]:
        """Return heading and cells of a column."""
        column = self.columns[number]
        cells = [*([column.header] if self.show_header else []), *column.cells]
        return [cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells]

    def _stacked(self) -> Iterator[RenderableType]:
        if self.title:
            yield (
                self.title
                if isinstance(self.title, Text)
                else Text(self.title, style=self.title_style or "table.title")
            )
        columns = [self._cells(number)[1 if self.show_header else 0 :] for number in range(len(self.columns))]
        names = max(range(len(columns)), key=lambda n: max(map(_longest_word, columns[n]), default=0))
        for row in zip(*columns, strict=True):
            yield row[names]
            others = [
                Text.assemble((str(column.header), "dim"), " " if column.header else "", Text(", ").join(cell.split()))
                for number, (column, cell) in enumerate(zip(self.columns, row, strict=True))
                if number != names and cell.plain.strip()
            ]
            yield Padding(Text("; ").join(others), (0, 0, 0, 2), expand=False)
        if self.caption:
            yield self.caption if isinstance(self.caption, Text) else Text(self.caption)


def _widest(cell: Text) -> int:
    return max((line.cell_len for line in cell.split()), default=0)


def _longest_word(cell: Text) -> int:
    return max((Text(word).cell_len for word in cell.plain.split()), default=0)
