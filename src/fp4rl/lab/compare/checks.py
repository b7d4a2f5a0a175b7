"""Cross-checks that take the problems as random too. They confirm or warn; the verdict is over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fp4rl.lab.compare.sides import Side
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.statistics.crossed import Bootstrapped, multi_bootstrap, two_way
from fp4rl.lab.statistics.proportions import PairedFlips, mcnemar
from fp4rl.lab.statistics.seeds import Difference

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DRAWS_SEED = 20210630  # the bootstrap's draws are the same in every call


@dataclass(frozen=True)
class CrossChecks:
    """Differences in points; each is None where it cannot be made."""

    two_way: Difference | None = None
    bootstrap: Bootstrapped | None = None
    checkpoints: PairedFlips | None = None  # McNemar: two single checkpoints, never two recipes
    unread: tuple[str, ...] = ()  # runs whose folder, and with it their items, is not here


@dataclass(frozen=True)
class ScoreTable:
    """`scores`: [runs, problems], the share of samples solved, runs in the order given, `problems` are their ids."""

    problems: tuple[str, ...]
    scores: "NDArray[np.float64]"


def cross_checks(treatment: Side, control: Side) -> CrossChecks:
    """What the items of the same problems on both sides say."""
    if unread := tuple(
        side_run.run.key for side in (treatment, control) for side_run in side.runs if side_run.run.folder is None
    ):
        return CrossChecks(unread=unread)
    first, second = _scores(treatment), _scores(control)
    if first is None or second is None or first.problems != second.problems:
        return CrossChecks()
    if len(first.scores) == len(second.scores) == 1:
        return CrossChecks(checkpoints=_flips(first, second))
    if min(len(first.scores), len(second.scores)) < 2:
        return CrossChecks()
    points = 100 * first.scores, 100 * second.scores
    return CrossChecks(two_way(*points), multi_bootstrap(*points, generator=np.random.default_rng(_DRAWS_SEED)))


def _scores(side: Side) -> ScoreTable | None:
    measured = side.runs[0].measured
    folders = [side_run.run.folder for side_run in side.runs if side_run.run.folder is not None]
    return score_table(folders, measured.step, measured.profile.name, side.score)


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


def _flips(first: ScoreTable, second: ScoreTable) -> PairedFlips | None:
    """McNemar counts solved and not solved; a share over several samples is neither."""
    if not all(np.isin(table.scores, (0.0, 1.0)).all() for table in (first, second)):
        return None
    change = first.scores - second.scores
    return mcnemar(int((change > 0).sum()), int((change < 0).sum()))
