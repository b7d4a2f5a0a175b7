"""Single problems of a run: what was asked, the gold answer, what was answered, and which were not solved."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp4rl.lab.folders import RunFolder
from fp4rl.spec.errors import NotFoundError, UserError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import parse
from fp4rl.spec.task import SPLITS, Problem


@dataclass(frozen=True)
class Failures:
    """The problems that a run did not solve in its last evaluation under a profile: number -> id, of so many."""

    profile: str
    step: int
    problems: int
    unsolved: Mapping[int, str]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        unsolved = [{"number": number, "problem_id": name} for number, name in self.unsolved.items()]
        return {"profile": self.profile, "step": self.step, "problems": self.problems, "unsolved": unsolved}


def ids_of(folder: RunFolder) -> list[str]:
    """Return the ids of a run's evaluated problems in their order: the first is number 1. Empty without items."""
    sets = folder.item_sets()
    rows = folder.items(*sets[-1], ["problem_id"])["problem_id"].to_pylist() if sets else []
    return list(dict.fromkeys(rows))


def named(folder: RunFolder, problem: str) -> str:
    """Return the id of a problem that is given by its number, from 1, or by its id.

    Raises NotFoundError for a number beyond the last.
    """
    if not problem.isdecimal():
        return problem
    ids = ids_of(folder)
    if not 1 <= int(problem) <= len(ids):
        raise NotFoundError(f"{folder.run_id} has no problem {problem}; its problems are numbered 1 to {len(ids)}")
    return ids[int(problem) - 1]


def failures(folder: RunFolder) -> list[Failures]:
    """Return, for each profile of the last evaluation, the problems without a right answer."""
    last = max((step for step, _ in folder.item_sets()), default=None)
    lists = []
    for step, profile in folder.item_sets():
        if step == last:
            solved: dict[str, bool] = {}
            for row in folder.items(step, profile, ["problem_id", "strict"]).to_pylist():
                solved[row["problem_id"]] = solved.get(row["problem_id"], False) or row["strict"]
            unsolved = {number: name for number, (name, right) in enumerate(solved.items(), 1) if not right}
            lists.append(Failures(profile, step, len(solved), unsolved))
    return lists


def asked_of(spec: Mapping[str, Any], problem_id: str) -> tuple[Problem | None, str]:
    """Return the problem of that id from a run's own task, or None and why it cannot be shown."""
    if not spec:
        return None, "the run has no description"
    try:
        task = parse(Experiment, {"task": spec["task"]}, "").task
        splits = [spec.get("evaluation", {}).get("split", "test"), *SPLITS]
        for split in dict.fromkeys(splits):
            count = spec.get("evaluation", {}).get("count") if split == splits[0] else None
            problems = {problem.id: problem for problem in task.problems(split, count)}
            if problem_id in problems:
                return problems[problem_id], ""
    except (UserError, KeyError) as error:
        return None, f"its question cannot be read again ({error})"
    return None, "its task has no such problem any more"
