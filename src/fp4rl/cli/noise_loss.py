"""What each arm's noise does to the loss before any training, for `fp4rl schedule SPEC --loss DRAWS`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fp4rl.cli.terminal import console, progress, ready_to_round
from fp4rl.noise.schedule import asked_sigma
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from fp4rl.lab.matrix import PlannedRun
    from fp4rl.spec.experiment import Experiment

TEXTS = 64


def losses_of(runs: "Sequence[PlannedRun]", draws: int, sigma: float | None, root: Path) -> dict[str, Any]:
    """Losses of every arm that starts from the first arm's model under its injection, and differences to the quiet arm.

    The quiet arm is the first without noise, or the first of all. Sigma is the greatest of any schedule unless given.
    """
    from fp4rl.models.quiet import quiet

    quiet()
    from fp4rl.diagnose.calibration import calibrate_answers
    from fp4rl.diagnose.noise_loss import noise_losses
    from fp4rl.models.load import load
    from fp4rl.rl.start import start_folder

    ready_to_round()
    arms = {run.arm: run.experiment for run in reversed(runs)}
    first = runs[0].experiment
    alike = {arm: found for arm, found in reversed(arms.items()) if _same_start(found, first)}
    task = first.task
    model, tokenizer = load(start_folder(first.model, task, root / "models"), first.model.dtype)
    pairs = [(p.prompt, p.solution) for p in task.problems("train", TEXTS)]
    asked = sigma if sigma is not None else max(_greatest(found) for found in alike.values())
    with progress(console(stderr=True)) as bar:
        place = bar.add_task("draws", total=draws)
        losses = noise_losses(
            model,
            first.injection,
            {arm: found.noise for arm, found in alike.items()},
            calibrate_answers(tokenizer, pairs),
            sigma=asked,
            draws=draws,
            on_progress=lambda done, _: bar.update(place, completed=done),
        )
    quiet_arm = next((arm for arm, found in alike.items() if found.noise is None), next(iter(alike)))
    return {"sigma": asked, "draws": draws, "against": quiet_arm, "arms": _rows(losses, quiet_arm)}


def show_losses(screen: "Console", found: dict[str, Any]) -> None:
    """One row per arm; p after Holm over the arms."""
    draws = f"sigma {found['sigma']:g}, {counted(found['draws'], 'draw')}"
    title = f"loss of the answers without training, {draws}, against {found['against']}"
    table = Table(title=title, title_justify="left")
    for name in ("arm", "loss", "sd", "difference", "95 % interval", "p (Holm)"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for row in found["arms"]:
        cells = [row["arm"], f"{row['mean']:.4f}", f"{row['sd']:.4f}"]
        if row["difference"] is not None:
            cells += [f"{row['difference']:+.4f}", f"[{row['low']:+.4f}, {row['high']:+.4f}]", f"{row['p']:.2g}"]
        table.add_row(*cells)
    screen.print(table)


def _rows(losses: dict[str, list[float]], against: str) -> list[dict[str, Any]]:
    from fp4rl.lab.statistics.families import holm
    from fp4rl.lab.statistics.seeds import welch

    tested = {}
    for arm, values in losses.items():
        paired = [value - base for value, base in zip(values, losses[against], strict=True)]
        if len(set(paired)) > 1:  # one sample against 0: Welch with a side that does not vary is the paired t-test
            tested[arm] = welch(paired, [0.0] * len(paired))
    adjusted = dict(zip(tested, holm([found.p for found in tested.values()]), strict=True))
    rows = []
    for arm, values in losses.items():
        row: dict[str, Any] = {"arm": arm, "mean": fmean(values), "sd": stdev(values), "losses": values}
        found = tested.get(arm)
        keys = ("difference", "low", "high", "p")
        numbers = (found.value, found.low, found.high, adjusted[arm]) if found else (None,) * 4
        rows.append(row | dict(zip(keys, numbers, strict=True)))
    return rows


def _same_start(found: "Experiment", first: "Experiment") -> bool:
    return (found.model, found.task, found.injection) == (first.model, first.task, first.injection)


def _greatest(found: "Experiment") -> float:
    if found.noise is None:
        return 0.0
    steps = found.training.steps
    return max(asked_sigma(found.noise, step, steps) for step in range(steps))


def require_draws(draws: int | None, sigma: float | None) -> None:
    """A sigma without draws would do nothing."""
    if sigma is not None and draws is None:
        raise InvalidValueError("--sigma is for --loss; say how many draws, such as --loss 20")
