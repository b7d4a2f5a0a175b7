"""`fp4rl schedule`: print and plot a noise schedule step by step."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fp4rl.cli.described import runs_of
from fp4rl.cli.options import AsJson, Overrides, RunsRoot, SpecFile
from fp4rl.cli.terminal import console, log_curve, print_json, styled, table
from fp4rl.lab.matrix import PlannedRun
from fp4rl.models.quiet import quiet
from fp4rl.noise.schedule import asked_sigma, multiplier_at, share_bf16_can_change, stages, values_missed
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.noise import Noise
from fp4rl.spec.words import counted

WITHOUT_MODEL = Counter({1.0: 1})  # norms are initialised to one
# What determines the curve and the table of a schedule; arms may differ in their multipliers alone.
_SHAPES = ("schedule", "steps", "control", "operation", "precision", "weights_dtype")


def command(
    spec: SpecFile,
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option(help="Model folder; its norm weights decide how much of the noise BF16 can keep.")
    ] = None,
    loss: Annotated[
        int | None, typer.Option(min=2, help="Also measure the loss under so many draws of noise, without training.")
    ] = None,
    sigma: Annotated[float | None, typer.Option(min=0.0, help="Sigma of --loss; else the schedules' largest.")] = None,
    runs: RunsRoot = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Print and plot sigma per step, the multipliers, and how much of each stage BF16 can keep.

    Example: `fp4rl schedule catalogue/aqn_strategies noise.schedule.num_stages=5 training.steps=40`
    """
    if sigma is not None and loss is None:
        raise InvalidValueError("--sigma is for --loss; say how many draws, such as --loss 20")
    norms = _norm_values(model) if model else None
    planned = runs_of(spec, overrides or [])
    schedules = [_facts(arms, experiment, norms, model) for experiment, arms in _with_noise(spec, planned)]
    losses = None
    if loss:
        quiet()
        from fp4rl.cli.noise_loss import losses_of, show_losses  # they import torch

        losses = losses_of(planned, loss, sigma, runs)
    if as_json:
        print_json({"schedules": schedules, "losses": losses})
        return
    weights = "its norm weights" if model else "norm weights of 1.0"
    for number, facts in enumerate(schedules):
        _show(facts, weights, schedules[:number])
    if losses:
        show_losses(losses)


def _with_noise(spec: Path, planned: Sequence[PlannedRun]) -> list[tuple[Experiment, list[str]]]:
    """Return the experiments with noise, one for each different (noise, steps, dtype), with the arms that share it."""
    groups: dict[tuple[Noise, int, str], tuple[Experiment, list[str]]] = {}
    for run in planned:
        if run.experiment.noise is not None:
            key = (run.experiment.noise, run.experiment.training.steps, run.experiment.model.dtype)
            arms = groups.setdefault(key, (run.experiment, []))[1]
            if run.arm not in arms:
                arms.append(run.arm)
    if not groups:
        cure = "add `noise: {schedule: geometric}`, or noise=... on the command line"
        raise InvalidValueError(f"{spec}: no noise in it; {cure}")
    return list(groups.values())


def _facts(arms: list[str], experiment: Experiment, norms: Counter[float] | None, model: Path | None) -> dict[str, Any]:
    noise, total = experiment.noise, experiment.training.steps
    assert noise is not None
    offset = _offset(model, noise) if model and noise.operation == "multiplicative" else 0.0
    rows = []
    for stage in stages(noise.schedule, total):
        sigma = 0.0 if noise.control == "sigma_zero" else stage.sigma
        share = share_bf16_can_change(norms or WITHOUT_MODEL, sigma, noise.operation, offset)
        rows.append({"first_step": stage.first, "last_step": stage.last, "sigma": sigma, "bf16_share_changed": share})
    return {
        "arms": arms,
        "schedule": noise.schedule.model_dump(mode="json"),
        "control": noise.control,
        "operation": noise.operation,
        "precision": noise.precision,
        "weights_dtype": experiment.model.dtype,
        "steps": total,
        "sigma": [asked_sigma(noise, step, total) for step in range(total)],
        "stages": rows,
        "values_missed": list(values_missed(noise.schedule, total)),
        "multipliers": _multipliers(noise, experiment),
    }


def _multipliers(noise: Noise, experiment: Experiment) -> list[dict[str, Any]]:
    """Return the factor of each layer at the start and at the end of the run; of named layers if depth is unknown."""
    embedded = experiment.model.embedded
    named = max((layer for layer, _ in noise.multipliers.by_layer), default=-1) + 1
    depth = embedded.num_layers if embedded else named
    ends = {"at_start": 0.0, "at_end": 1.0}
    return [
        {"layer": layer} | {end: multiplier_at(noise.multipliers, layer, depth, share) for end, share in ends.items()}
        for layer in [*range(depth), None]
    ]


def _show(facts: dict[str, Any], weights: str, before: Sequence[dict[str, Any]]) -> None:
    """Print a schedule, or which of those `before` has the same curve."""
    screen, name = console(), (", ".join(facts["arms"]), "bold")
    for other in before:
        if all(other[key] == facts[key] for key in _SHAPES):
            screen.print(styled(name, f": sigma as in {', '.join(other['arms'])}"))
            _show_multipliers(facts["multipliers"])
            return
    screen.print(styled(name, f": {facts['schedule']['kind']}, {counted(facts['steps'], 'step')}"))
    if facts["control"] != "no":
        screen.print(f"control: {facts['control']}")
    for line in log_curve(facts["sigma"], width=min(screen.width - 12, 100)):
        screen.print(line)
    _show_stages(facts, weights)
    _show_multipliers(facts["multipliers"])
    if facts["values_missed"]:
        missed = ", ".join(f"{value:.4g}" for value in facts["values_missed"])
        screen.print(f"the run is too short to reach sigma {missed}; use fewer stages or more steps", style="yellow")


def _show_stages(facts: dict[str, Any], weights: str) -> None:
    # BF16 loses noise that is written into BF16 weights, but not in wider weights, nor where the norm adds it in FP32.
    in_bf16 = facts["weights_dtype"] == "bfloat16" and facts["precision"] == "weight"
    rows = []
    for row in facts["stages"] if len(facts["stages"]) <= 24 else facts["stages"][:: len(facts["stages"]) // 12]:
        swallowed = in_bf16 and row["sigma"] > 0 and row["bf16_share_changed"] < 0.05
        low = (" mostly swallowed" if swallowed else "", "yellow")
        steps = f"{row['first_step']}-{row['last_step']}"
        rows.append((steps, f"{row['sigma']:.4g}", styled(f"{row['bf16_share_changed']:.1%}", low)))
    changed = f"changed {'in bf16' if in_bf16 else 'if written in bf16'} ({weights})"
    console().print(table("steps", "sigma", changed, rows=rows, lines=True))
    if facts["precision"] == "float32":
        console().print("this run swallows none of it: the norms compute with it")
    elif facts["weights_dtype"] == "float16":
        console().print("weights are float16, whose steps are an eighth of bfloat16's")
    elif not in_bf16:
        console().print("this run swallows none of it: weights are float32")


def _show_multipliers(rows: list[dict[str, Any]]) -> None:
    if all(row["at_start"] == row["at_end"] == 1.0 for row in rows):
        console().print("multipliers: 1 on every layer")
        return
    changing = any(row["at_start"] != row["at_end"] for row in rows)
    for key, when in (("at_start", " at the start"), ("at_end", " at the end")) if changing else (("at_start", ""),):
        cells = (f"{'others' if row['layer'] is None else row['layer']}:{row[key]:g}" for row in rows)
        console().print(f"multipliers{when}, layer:factor  {' '.join(cells)}")


def _offset(folder: Path, noise: Noise) -> float:
    """Return what most norms of a model add to their weight before they multiply by it."""
    quiet()
    from fp4rl.models.load import skeleton
    from fp4rl.noise.targets import noisy_weights

    return Counter(weight.offset for weight in noisy_weights(skeleton(folder), noise, share=0.0)).most_common(1)[0][0]


def _norm_values(folder: Path) -> Counter[float]:
    """Count the BF16 values of all one-dimensional weights with `norm` in their name; needs torch, loads no model."""
    from fp4rl.models.shards import stored_tensors

    values: Counter[float] = Counter()
    for name, stored in stored_tensors(folder).items():
        if "norm" in name and name.endswith("weight") and len(stored.shape) == 1:
            values.update(stored.read().bfloat16().float().tolist())
    if not values:
        raise InvalidValueError(f"{folder}: no norm weight in its safetensors files; give a Hugging Face model folder")
    return values
