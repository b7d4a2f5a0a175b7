"""Three fake steps of every arm through the path that a run takes, and what they recorded, by value.

A start that is too large is stood in for by the embedded model: noise, injection, loss and recipe are the
arm's own. A stage that begins with what another trains is tried on their common model. Sizes are cut to what a CPU
does in seconds.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from fp4rl.lab.foreign.tensorboard import read_tensorboard
from fp4rl.lab.matrix import single
from fp4rl.lab.preflight.copies import EMBEDDED, STEPS, attempted, basis, cut, scratch
from fp4rl.lab.preflight.model import modules_of
from fp4rl.lab.preflight.rows import Check, Once, Row, Subject, of_arms
from fp4rl.lab.runs import Run, read_run
from fp4rl.noise.schedule import asked_sigma, multiplier_at
from fp4rl.rl.events import SitesResolved
from fp4rl.sites.walk import layer_count, walk
from fp4rl.spec.errors import UserError
from fp4rl.spec.evidence import LayerNoise, LiveCheck, MasterCheck, RolloutNoise
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.noise import EpochAware, Noise
from fp4rl.spec.words import counted

_DEVIATIONS = 7  # of standard errors, 1 / sqrt(2 n) of n values: as the run's own check of each rollout


@dataclass(frozen=True)
class Tried:
    """The fake run of one arm: what it recorded, its curves as they were exported, or why it came to no end.

    `stand_in`: what it ran on where that is not the start of the arm itself. `rates`: the learning rate of each update
    that its optimizer made.
    """

    stand_in: str = ""
    run: Run | None = None
    exported: Mapping[int, Mapping[str, float]] | None = None
    rates: tuple[float, ...] = ()
    error: str = ""
    waits: str = ""


@Once
def tried(subject: Subject) -> dict[str, Tried]:
    """Return the fake run of each arm."""
    return tried_of(subject, tuple(subject.arms))


def tried_of(subject: Subject, arms: Iterable[str], within: str | None = None) -> dict[str, Tried]:
    """Return the fake runs of some arms, done in a temporary folder, `within` another one."""
    with scratch(subject.root, within) as folder:
        return {arm: _try(arm, subject.arms[arm], folder) for arm in arms}


def _try(arm: str, experiment: Experiment, root: Path) -> Tried:
    stand_in, waits = basis(experiment)
    if waits:
        return Tried(waits=waits)
    try:
        small = cut(experiment, stand_in=stand_in == EMBEDDED)
    except (UserError, ValueError) as error:
        return Tried(stand_in, waits=f"no small copy of it: {str(error).splitlines()[0]}")
    made, failed, waits = attempted(stand_in, lambda: _run(small, arm, root))
    return replace(made, stand_in=stand_in) if made is not None else Tried(stand_in, error=failed, waits=waits)


def _run(small: Experiment, arm: str, root: Path) -> Tried:
    from fp4rl.lab.work import execute_run  # and with it TRL

    rates: list[float] = []

    def note(optimizer: Any, *_: Any) -> None:
        rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_event(event: Any) -> None:
        if isinstance(event, SitesResolved):  # training begins: what came before is the warm-up of a model
            rates.clear()

    hook = register_optimizer_step_post_hook(note)
    try:
        folder = execute_run(single(small, f"tried-{arm}"), root, on_event)
    finally:
        hook.remove()
    curves = read_tensorboard(folder.path / "tensorboard").steps
    return Tried(run=read_run(folder), exported=curves, rates=tuple(rates))


def of_steps(look: Callable[[Run, Tried], Iterator[Row]]) -> Callable[[Subject], Iterator[Row]]:
    """Return a check that looks at the fake run of each arm that came to its end."""
    return of_arms(tried, lambda own: look(own.run, own) if own.run is not None else ())


def ended(own: Tried) -> Iterator[Row]:
    """Take the fake steps, which stop themselves where something is wrong, and look for gaps in what they recorded."""
    expected = "each step taken, and no gap in its evidence"
    if own.waits:
        yield Row("waits", own.waits, expected)
    elif own.run is None:
        yield Row("fail", own.error, expected)
    elif own.run.gaps:
        yield Row("fail", "; ".join(own.run.gaps), expected)
    else:
        where = f" on {own.stand_in}" if own.stand_in else ""
        calls = sum(own.run.result.evidence.calls.values())
        yield Row("pass", f"{STEPS} steps{where}; {counted(calls, 'rounded call')}", expected)


def rollouts(run: Run, _: Tried) -> Iterator[Row]:
    """Compare the digests of the master weights around every rollout and evaluation."""
    checked = run.of(MasterCheck)
    changed = [line for line in checked if not line.unchanged]
    expected = "master weights as before, after rollouts and evaluations"
    cure = "" if not changed else "noise or rounding wrote them"
    measured = f"{len(checked)} digests before and after, {len(changed)} changed"
    yield Row("fail" if changed or not checked else "pass", measured, expected, cure)


def noise(run: Run, _: Tried) -> Iterator[Row]:
    """Compare the noise measured on each layer's weights with the schedule's sigma of that step times its factor."""
    planned = Experiment.model_validate(run.spec).noise
    if planned is None or planned.control == "sigma_zero":
        return
    drawn = [(layer, sigma) for layer, sigma in _due(run, planned) if sigma > 0]
    expected = "1 in every layer, within its sampling error"
    if not drawn:
        yield Row("warn", f"sigma is 0 in all of {STEPS} steps", "a sigma above 0", "see `fp4rl schedule`")
        return
    ratios = [layer.drawn / sigma for layer, sigma in drawn]
    allowed = [_DEVIATIONS / sqrt(2 * layer.elements) for layer, _ in drawn]
    still = [layer.layer for layer, _ in drawn if not layer.share_changed > 0]
    measured = f"realised over asked {min(ratios):.3f} to {max(ratios):.3f} in {counted(len(drawn), 'draw')}"
    if any(not abs(ratio - 1) <= most for ratio, most in zip(ratios, allowed, strict=True)):
        yield Row("fail", measured, expected, "the noise is not wired to these layers, or not to the step")
    elif still:
        yield Row("warn", f"{measured}; layer {still[0]} keeps its bits", expected, "noise.precision: float32")
    else:
        yield Row("pass", measured, expected)


def _due(run: Run, planned: Noise) -> Iterator[tuple[LayerNoise, float]]:
    """Yield the noise of each layer and step with what the description asks for there, whatever the run says of it."""
    lines = run.of(RolloutNoise)
    layers = layer_count(walk(modules_of(Experiment.model_validate(run.spec).model)))
    # Its epochs end when the data do, which the steps tell.
    by_data = isinstance(planned.schedule, EpochAware) and any(line.sigma > 0 for line in lines)
    for line in lines:
        sigma = line.sigma if by_data else asked_sigma(planned, line.step, STEPS)
        share = line.step / STEPS
        for own in line.layers:
            yield own, sigma * multiplier_at(planned.multipliers, own.layer, layers, share)


def spread(run: Run, own: Tried) -> Iterator[Row]:
    """Look at the groups whose answers earn different rewards: from all others nothing is learned."""
    expected = "groups that differ, from the first step on"
    if own.stand_in:
        yield Row("waits", "the answers of the start itself", expected)
        return
    if (run.spec["training"].get("distillation") or {}).get("alone"):
        return
    first = run.curves[min(run.curves)]
    without, groups = first["reward/no_spread"], int(first["rollout/groups"])
    differ = round((1 - without) * groups)
    measured = f"{differ} of {counted(groups, 'group')} differ in step 1, mean reward {first['reward/mean']:.3g}"
    cure = "easier problems, a better start, more answers a group, a higher training.temperature"
    filtered = Experiment.model_validate(run.spec).training.filters
    kept = [m["reward/no_spread"] < 1 or (filtered and m["sampling/trained_groups"] > 0) for m in run.curves.values()]
    if not any(kept):
        yield Row("fail", f"no group differs in {STEPS} steps, mean reward {first['reward/mean']:.3g}", expected, cure)
    elif not differ:
        yield Row("warn", measured, expected, cure)
    else:
        yield Row("pass", measured, expected)


def live(run: Run, _: Tried) -> Iterator[Row]:
    """Compare the logits of the trained policy with those of its saved copy, loaded anew."""
    lines = run.of(LiveCheck)
    off = max((line.max_difference for line in lines), default=float("inf"))
    cure = "" if off == 0 else "a rounded copy went stale"
    measured = f"logits differ by {off:g} from a freshly loaded copy's"
    yield Row("pass" if off == 0 else "fail", measured, "0", cure)


def curves(run: Run, own: Tried) -> Iterator[Row]:
    """Read back what was exported, and hold every number against what was logged."""
    logged = {(step, name): value for step, line in run.curves.items() for name, value in line.items()}
    read = {(step, name): value for step, line in (own.exported or {}).items() for name, value in line.items()}
    lost = [name for (step, name), value in logged.items() if read.get((step, name)) != value]
    names = sorted({name for _, name in logged})
    expected = "exported numbers equal logged ones, bit for bit"
    measured = f"{len(names)} metrics in {counted(len(run.curves), 'step')}, {len(lost)} lost"
    if lost or not names:
        yield Row(
            "fail", f"{measured}, such as {', '.join(lost[:1]) or 'all'}", expected, "another version of tensorboard"
        )
    else:
        yield Row("pass", measured, expected)


CHECKS = (
    Check("steps", ("P10", "P13", "P24", "P25", "P50"), of_arms(tried, ended)),
    Check("rollouts", ("P06", "P09"), of_steps(rollouts)),
    Check("noise", ("P03",), of_steps(noise)),
    Check("spread", ("P25",), of_steps(spread)),
    Check("live", ("P35",), of_steps(live)),
    Check("curves", ("P33",), of_steps(curves)),
)
