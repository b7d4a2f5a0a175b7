"""Which problems the runs of an arm solved, as one table of seeds by problems."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sqlalchemy import Connection, select

from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.packing import unpack_flags, unpack_problems
from fp4rl.lab.ledger.query import chunks

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ScoreTable:
    """`scores`: [runs, problems], the share of samples solved, in the order of `runs` and of `problems` (their ids)."""

    runs: tuple[int, ...]
    problems: tuple[str, ...]
    scores: "NDArray[np.float64]"


def score_table(
    connection: Connection, ids: Sequence[int], step: int, profile: str, score: str = "strict"
) -> ScoreTable | None:
    """The items of these runs at one step and profile; None where a run has none or they answer other problems."""
    found: dict[int, tuple[str, bytes]] = {}
    columns = (tables.items.c.run, tables.items.c.problems, tables.items.c[score])
    for some in chunks(ids):
        query = select(*columns).where(
            tables.items.c.run.in_(some), tables.items.c.step == step, tables.items.c.profile == profile
        )
        found |= {run: (digest, packed) for run, digest, packed in connection.execute(query)}
    lists = {digest for digest, _ in found.values()}
    if len(found) < len(ids) or len(lists) != 1:
        return None
    query = select(tables.problem_lists.c.packed).where(tables.problem_lists.c.digest == lists.pop())
    names, _ = unpack_problems(connection.execute(query).scalar_one())
    problems, first, samples = np.unique(names, return_index=True, return_counts=True)  # rows are sorted by problem
    flags = np.stack([unpack_flags(found[run][1], len(names)) for run in ids])  # [runs, rows]
    solved = np.add.reduceat(flags, first, axis=1, dtype=np.float64)  # [runs, problems]
    return ScoreTable(tuple(ids), tuple(problems.tolist()), solved / samples)
