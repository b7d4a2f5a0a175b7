"""Cross-checks that take the problems as random too. They confirm or warn; the verdict is over seeds."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fp4rl.lab.compare.sides import Side
from fp4rl.lab.statistics.crossed import Bootstrapped, multi_bootstrap, two_way
from fp4rl.lab.statistics.proportions import PairedFlips, mcnemar
from fp4rl.lab.statistics.seeds import Difference

if TYPE_CHECKING:
    from fp4rl.lab.statistics.crossed import Scores

_DRAWS_SEED = 20210630  # the bootstrap's draws are the same in every call


@dataclass(frozen=True)
class CrossChecks:
    """Differences in points; each is None where it cannot be made."""

    two_way: Difference | None = None
    bootstrap: Bootstrapped | None = None
    checkpoints: PairedFlips | None = None  # McNemar: two single checkpoints, never two recipes
    unread: tuple[str, ...] = ()  # runs whose folder, and with it their items, is not here


def cross_checks(treatment: Side, control: Side) -> CrossChecks:
    """What the items of the same problems on both sides say. Raises `Damaged` for a file that cannot be read."""
    runs = [side_run.run for side in (treatment, control) for side_run in side.runs]
    if unread := tuple(run.key for run in runs if run.folder is None):
        return CrossChecks(unread=unread)
    (problems, first), (others, second) = _score_table(treatment), _score_table(control)
    if not problems or problems != others:
        return CrossChecks()
    if len(first) == len(second) == 1:
        # McNemar counts solved and not solved; a share over several samples is neither.
        single = np.isin(np.concatenate([first, second]), (0.0, 1.0)).all()
        gained, lost = int((first > second).sum()), int((first < second).sum())
        return CrossChecks(checkpoints=mcnemar(gained, lost) if single else None)
    if min(len(first), len(second)) < 2:
        return CrossChecks()
    points = 100 * first, 100 * second
    return CrossChecks(two_way(*points), multi_bootstrap(*points, generator=np.random.default_rng(_DRAWS_SEED)))


def _score_table(side: Side) -> tuple[list[str], "Scores"]:
    """The ids of the problems, and [runs, problems], the share of samples solved.

    No problems where a run has no items here, and where runs answer other problems or other numbers of samples.
    """
    measured = side.runs[0].measured
    answered: list[tuple[list[str], list[int]]] = []  # problems and samples of each, run by run
    shares = []
    for folder in (side_run.run.folder for side_run in side.runs):
        if folder is None or (measured.step, measured.profile.name) not in folder.item_sets():
            return [], np.empty((0, 0))
        items = folder.items(measured.step, measured.profile.name, ["problem_id", side.score])
        names, row, counts = np.unique(items.column("problem_id").to_pylist(), return_inverse=True, return_counts=True)
        answered.append((names.tolist(), counts.tolist()))
        solved = [flag is True for flag in items.column(side.score).to_pylist()]
        shares.append(np.bincount(row, weights=solved) / counts)  # [problems]
    if any(other != answered[0] for other in answered):
        return [], np.empty((0, 0))
    return answered[0][0], np.stack(shares)
