"""Where a step's time goes, from the times that every run logs (`time/*_s` in metrics.jsonl)."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

from fp4rl.lab.files import write_whole
from fp4rl.lab.folders import RunFolder
from fp4rl.spec.errors import NotFoundError

WHAT: Mapping[str, str] = {
    "generation": "sampling the answers",
    "rewards": "scoring the answers, choosing groups",
    "noise": "noise on and off, proof that the masters are unchanged",
    "batch": "padding and advantages",
    "reference": "log-probabilities of the KL reference",
    "comparison": "rollout phase against training phase (first steps, then every tenth)",
    "forward": "forward of the policy, with rounding",
    "teacher": "forward and KL of the teacher",
    "loss": "loss and its metrics",
    "backward": "backward and gradient clipping",
    "old_logps": "old log-probabilities of later updates",
    "optimizer": "the optimizer's step",
    "other": "the trainer's own work",
    "between": "evaluations on the way, checkpoints, logs",
}


@dataclass(frozen=True)
class Share:
    """One kind of work: seconds a step, and its share of all."""

    name: str
    seconds: float
    share: float


def where_time_goes(folder: RunFolder) -> tuple[Share, ...]:
    """Return the kinds of work of a run, the longest first; the first step, which warms everything up, is left out.

    Raises NotFoundError when the run logged no step.
    """
    steps = list(folder.metrics().values())
    steps = steps[1:] or steps
    seconds = {name: mean(step.get(f"time/{name}_s", 0.0) for step in steps) for name in WHAT} if steps else {}
    whole = sum(seconds.values())
    if not whole:
        raise NotFoundError(f"{folder.key} has logged no times: it ended before its first step, or older code ran it")
    shares = [Share(name, spent, spent / whole) for name, spent in seconds.items() if spent > 0]
    return tuple(sorted(shares, key=lambda share: -share.seconds))


def write_profile(folder: RunFolder) -> tuple[Share, ...]:
    """Write `profile.md` beside the run's results and return its rows."""
    shares = where_time_goes(folder)
    rows = [f"| {part.name} | {part.seconds:.4f} | {part.share:.1%} | {WHAT[part.name]} |" for part in shares]
    whole = sum(part.seconds for part in shares)
    head = [f"# Where a step of {folder.key} goes", "", f"{whole:.4f} s a step, mean over all steps but the first.", ""]
    table = ["| work | s a step | share | what it is |", "|---|---|---|---|", *rows, ""]
    write_whole(folder.path / "profile.md", "\n".join([*head, *table]))
    return shares
