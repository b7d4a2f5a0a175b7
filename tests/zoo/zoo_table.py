"""The table of docs/models.md: written here (`make zoo`), and read by the test that holds every row."""

import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def read() -> dict[str, dict[str, str]]:
    """Family -> mode -> what came of it, refusals in full."""
    rows, reasons, modes = {}, {}, []
    for line in PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| architecture"):
            modes = cells[1:]
        elif line.startswith("| `"):
            rows[cells[0].strip("`")] = dict(zip(modes, cells[1:], strict=True))
        elif line[:1].isdigit():
            number, _, reason = line.partition(". ")
            reasons[f"refused ({number})"] = f"refused: {reason}"
    return {name: {mode: reasons.get(cell, cell) for mode, cell in row.items()} for name, row in rows.items()}


def written(rows: dict[str, dict[str, str]]) -> str:
    """The same as Markdown, each refusal once below the table."""
    modes = list(next(iter(rows.values())))
    refusals = dict.fromkeys(said for row in rows.values() for said in row.values() if said.startswith("refused: "))
    numbers = {said: f"refused ({number})" for number, said in enumerate(refusals, start=1)}
    lines = [f"| architecture | {' | '.join(modes)} |", "|---" * (len(modes) + 1) + "|"]
    lines += [
        f"| `{name}` | {' | '.join(numbers.get(row[mode], row[mode]) for mode in modes)} |"
        for name, row in rows.items()
    ]
    lines += ["", *(f"{number}. {said.removeprefix('refused: ')}" for number, said in enumerate(refusals, start=1))]
    return "\n".join(lines)


def main() -> int:
    """Measure every family and write the page; 1 where one is neither exact nor refused."""
    import torch
    import zoo_families as families

    import zoo

    torch.set_num_threads(1)
    rows, wrong = {}, []
    for family in sorted(families.FAMILIES):
        model, rows[family] = families.tiny(family), {}
        for mode in zoo.MODES:
            try:
                rows[family][mode] = zoo.outcome(model, mode)
            except AssertionError as error:
                wrong.append(f"{family}, {mode}: {error}")
        print(f"{family}: {', '.join(sorted(set(rows[family].values())))[:100]}", file=sys.stderr, flush=True)
    if wrong:
        print("\n".join(wrong))
        return 1
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = before + BEGIN + "\n" + written(rows) + "\n" + rest[rest.index(END) :]
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
