"""Which problems the runs of an arm solved, as one table of seeds by problems, read from their items."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fp4rl.lab.folders import RunFolder

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ScoreTable:
    """`scores`: [runs, problems], the share of samples solved, runs in the order given, `problems` are their ids."""

    problems: tuple[str, ...]
    scores: "NDArray[np.float64]"


def score_table(runs: Sequence[RunFolder], step: int, profile: str, score: str = "strict") -> ScoreTable | None:
    """The items of these runs at one step and profile.

    None where a run has none or no folder here, and where they answer other problems or other numbers of samples.
    Raises `Damaged` for a file that cannot be read.
    """
    first: tuple[list[str], list[int]] | None = None  # problems and samples of each
    shares = []
    for run in runs:
        if (step, profile) not in run.item_sets():
            return None
        items = run.items(step, profile, ["problem_id", score])
        names, row, counts = np.unique(items.column("problem_id").to_pylist(), return_inverse=True, return_counts=True)
        answered = (names.tolist(), counts.tolist())
        first = first or answered
        if answered != first:
            return None
        solved = [flag is True for flag in items.column(score).to_pylist()]
        shares.append(np.bincount(row, weights=solved) / counts)  # [problems]
    return ScoreTable(tuple(first[0]), np.stack(shares)) if first else None
