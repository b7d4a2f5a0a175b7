"""Finished runs against what their paths and names point to now."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fp4rl.lab.damage import Damaged, damage_named
from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.rl.inputs import of_model, pointed_at


def changed_inputs(runs: Iterable[PlannedRun], root: Path) -> dict[str, Sequence[str]]:
    """Finished run -> which of its inputs are no longer what it was made from. An embedded model is not looked at:
    its folder is named by its recipe."""
    found: dict[str, Sequence[str]] = {}
    for run in runs:
        then = _then(run_folder(root, run.suite, run.run_id))
        now = pointed_at(run.experiment)
        if run.experiment.model.path is not None:
            now["start model"] = of_model(Path(run.experiment.model.path))
        others = [name for name, digest in now.items() if then.get(name, digest) != digest]
        if others:
            found[run.run_id] = others
    return found


def _then(folder: RunFolder) -> dict[str, str]:
    """What a run says it was made from; nothing where that cannot be read (whoever reports the run names it)."""
    try:
        with damage_named(folder.path / "result.json"):
            return dict((folder.result().get("evidence") or {}).get("inputs") or {})
    except Damaged:
        return {}
