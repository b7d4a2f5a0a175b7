"""The report of a search as one HTML file that needs no network, out of its records alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fp4rl.lab.search.records import Added, Cut, Decided, Planned, called
from fp4rl.lab.search.result import Result, Tried
from fp4rl.pages import page as pages
from fp4rl.pages.page import SYMBOLS, Figure, Trace, marks, over_steps, with_legend

_HEIGHT = 320


def page(result: Result, recipe: Mapping[str, Any] | None) -> str:
    """Return the page, the same bytes for the same records. Raises NotFoundError without the extra `report`."""
    figures = [figure for figure in (_front(result, by_bits=True), _front(result, by_bits=False)) if figure is not None]
    return pages.render(
        Path(__file__).with_name("search.html.j2"),
        figures,
        result=result,
        figures_drawn=figures,
        front={row.name for row in result.front(result.last_round)},
        rungs=result.space.screening.rungs,
        plan=result.book.last(Planned),
        rounds=list(_rounds(result)),
        recipe=None if recipe is None else yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True),
    )


def _rounds(result: Result) -> Iterator[str]:
    """Yield what each round decided, in words."""
    for line in result.book.lines:
        if isinstance(line, Added):
            names = ", ".join(map(called, line.candidates))
            yield f"Round {line.round + 1}: seed {line.seed} was added for {names}, since {line.why}."
        elif isinstance(line, Decided):
            kept = ", ".join(map(called, line.kept)) or "nobody"
            yield f"Round {line.round + 1}: {kept} went on, {len(line.dropped)} did not."
        elif isinstance(line, Cut):
            yield f"Screening ended before round {line.round + 1}: {line.why}."


def _front(result: Result, *, by_bits: bool) -> Figure | None:
    """Return accuracy against bits, or against seconds a step, with a mark for each candidate in its last round."""
    rungs, data = result.space.screening.rungs, list[Trace]()
    front = {row.name for row in result.front(result.last_round)}
    for number, steps in enumerate(rungs):
        rows = [row for row in result.tried if row.rounds == number + 1 and _across(row, by_bits) is not None]
        if rows:
            data.append(_marks(rows, number, f"{steps} steps", front, by_bits))
    if not data:
        return None
    title = "bits of a weight and of an input, mean" if by_bits else "seconds a step, evaluations included"
    layout = with_legend(over_steps(title, _HEIGHT))
    layout["hovermode"] = "closest"
    layout["yaxis"] = {"title": {"text": "accuracy, %"}}
    if by_bits:
        layout["xaxis"] = {"title": {"text": title}}
    best = ", ".join(f"{row.name} {100 * (row.last or 0):.1f} %" for row in result.tried[:3])
    what = "bits" if by_bits else "step cost"
    return Figure(
        f"front-{what[:4]}", f"Accuracy against {what}", f"Accuracy against {what}; first: {best}", data, layout
    )


def _across(row: Tried, by_bits: bool) -> float | None:
    if not by_bits:
        return row.step_s
    return None if row.bits is None else sum(row.bits) / 2


def _marks(rows: list[Tried], number: int, name: str, front: set[str], by_bits: bool) -> Trace:
    texts = [f"{row.name}: {row.words}" for row in rows]
    lines = [3 if row.name in front else 0 for row in rows]
    return marks(
        [round(_across(row, by_bits) or 0.0, 3) for row in rows],
        [round(100 * (row.last or 0.0), 2) for row in rows],
        "dots",
        number,
        name=name,
        text=texts,
        marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 9, "opacity": 0.75, "line": {"width": lines}},
        hovertemplate="%{text}<br>%{y:.1f} %, %{x:.3g}<extra></extra>",
    )
