"""The effect of each arm's noise on the loss before any training, for `fp4rl schedule SPEC --loss DRAWS`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fp4rl.cli.packed_start import start_of
from fp4rl.cli.terminal import console, progress, ready_to_round, table
from fp4rl.diagnose.calibration import calibrate_answers
from fp4rl.diagnose.noise_loss import noise_losses
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.stages import at_start
from fp4rl.lab.statistics.seeds import holm, welch
from fp4rl.noise.schedule import asked_sigma
from fp4rl.rl.verify import load_saved
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.words import counted

TEXTS = 64


def losses_of(runs: Sequence[PlannedRun], draws: int, sigma: float | None, root: Path) -> dict[str, Any]:
    """Measure the loss of every arm on the first arm's model and injection, and its difference to no noise.

    Compared is with the first arm without noise, else with the first arm. By default sigma is the largest of all
    schedules.
    """
    ready_to_round()
    first = runs[0].experiment
    alike: dict[str, Experiment] = {}
    for run in runs:
        if all(getattr(run.experiment, key) == getattr(first, key) for key in ("model", "start", "task", "injection")):
            alike.setdefault(run.arm, run.experiment)
    own = at_start(runs[0], root).model
    start = start_of(own, first.task, root)
    model, tokenizer = load_saved(start, own.dtype, own.lora, own.experts_implementation)
    pairs = [(p.prompt, p.solution) for p in first.task.problems("train", TEXTS)]
    used_sigma = sigma if sigma is not None else max(map(_greatest, alike.values()))
    with progress() as advance:
        losses = noise_losses(
            model,
            first.injection,
            {arm: experiment.noise for arm, experiment in alike.items()},
            calibrate_answers(tokenizer, pairs),
            sigma=used_sigma,
            draws=draws,
            on_progress=partial(advance, "draws"),
        )
    quiet_arm = next((arm for arm, experiment in alike.items() if experiment.noise is None), next(iter(alike)))
    return {"sigma": used_sigma, "draws": draws, "against": quiet_arm, "arms": _rows(losses, quiet_arm)}


def show_losses(losses: dict[str, Any]) -> None:
    """Print a row per arm, with p corrected over the arms (Holm)."""
    draws = f"sigma {losses['sigma']:g}, {counted(losses['draws'], 'draw')}"
    title = f"loss of the answers without training, {draws}, against {losses['against']}"
    rows = []
    for row in losses["arms"]:
        cells = [row["arm"], f"{row['mean']:.4f}", f"{row['sd']:.4f}"]
        if row["difference"] is not None:
            cells += [f"{row['difference']:+.4f}", f"[{row['low']:+.4f}, {row['high']:+.4f}]", f"{row['p']:.2g}"]
        rows.append(cells)
    names = ("loss>", "sd>", "difference>", "95 % interval>", "p (Holm)>")
    console().print(table("arm=", *names, rows=rows, title=title, lines=True))


def _rows(losses: dict[str, list[float]], against: str) -> list[dict[str, Any]]:
    tested = {}
    for arm, values in losses.items():
        paired = [value - base for value, base in zip(values, losses[against], strict=True)]
        if len(set(paired)) > 1:  # Welch's test against a constant 0 is the paired t-test
            tested[arm] = welch(paired, [0.0] * len(paired))
    adjusted = dict(zip(tested, holm([difference.p for difference in tested.values()]), strict=True))
    rows = []
    for arm, values in losses.items():
        row: dict[str, Any] = {"arm": arm, "mean": fmean(values), "sd": stdev(values), "losses": values}
        row |= dict.fromkeys(("difference", "low", "high", "p"))
        if d := tested.get(arm):
            row |= {"difference": d.value, "low": d.low, "high": d.high, "p": adjusted[arm]}
        rows.append(row)
    return rows


def _greatest(experiment: Experiment) -> float:
    noise, steps = experiment.noise, experiment.training.steps
    return max(asked_sigma(noise, step, steps) for step in range(steps)) if noise else 0.0
