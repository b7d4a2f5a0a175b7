"""Where a step's time goes, from the times that every run logs (`time/*_s` in metrics.jsonl)."""

from collections.abc import Mapping
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


def seconds_a_step(folder: RunFolder) -> dict[str, float]:
    """Return kind of work -> seconds a step, longest first, without the first step; NotFoundError without steps."""
    steps = list(folder.metrics().values())
    steps = steps[1:] or steps
    means = {name: mean(step.get(f"time/{name}_s", 0.0) for step in steps) for name in WHAT} if steps else {}
    if not any(means.values()):
        raise NotFoundError(f"{folder.key} has logged no times: it ended before its first step, or older code ran it")
    return dict(sorted(((name, spent) for name, spent in means.items() if spent > 0), key=lambda item: -item[1]))


def write_profile(folder: RunFolder) -> dict[str, float]:
    """Write `profile.md` beside the run's results and return its rows."""
    seconds = seconds_a_step(folder)
    whole = sum(seconds.values())
    rows = [f"| {name} | {spent:.4f} | {spent / whole:.1%} | {WHAT[name]} |" for name, spent in seconds.items()]
    head = [f"# Where a step of {folder.key} goes", "", f"{whole:.4f} s a step, mean over all steps but the first.", ""]
    table = ["| work | s a step | share | what it is |", "|---|---|---|---|", *rows, ""]
    write_whole(folder.path / "profile.md", "\n".join([*head, *table]))
    return seconds
