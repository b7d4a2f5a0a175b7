"""Three fake steps of every arm through the path that a run takes, and what they recorded, by value.

A start that is too large is stood in for by the embedded model: noise, injection, loss and recipe are the
arm's own. A stage that begins with what another trains is tried on their common model. Sizes are cut to what a CPU
does in seconds.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from fp4rl.lab.foreign.tensorboard import read_tensorboard
from fp4rl.lab.matrix import single
from fp4rl.lab.preflight.live import NOT_HERE, without_weights
from fp4rl.lab.preflight.model import modules_of
from fp4rl.lab.preflight.rows import Check, Row, Subject, merged
from fp4rl.lab.runs import Run, read_run
from fp4rl.noise.schedule import asked_sigma, multiplier_at
from fp4rl.sites.walk import layer_count, walk
from fp4rl.spec.errors import CheckFailed, UserError
from fp4rl.spec.evidence import LayerNoise, LiveCheck, MasterCheck, RolloutNoise
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.linked import START, TEACHER, links
from fp4rl.spec.load import merge
from fp4rl.spec.noise import EpochAware, Noise
from fp4rl.spec.words import counted
from fp4rl.tasks.arithmetic import Arithmetic

STEPS = 3
EMBEDDED, UNTRAINED = "the embedded model in its place", "its model before the stages that it starts from"
_PROMPTS, _DRAWS, _ANSWERS, _LONGEST, _JUDGED = 8, 2, 8, 64, 4
_DEVIATIONS = 7  # of standard errors, 1 / sqrt(2 n) of n values: as the run's own check of each rollout
# Without a warm-up no answer is right; every update still moves the weights.
_IN_ITS_PLACE: Mapping[str, Any] = {
    "model": {"path": None, "embedded": {"warm_up_steps": 0}, "lora": None, "experts_implementation": None},
    "task": {"name": "arithmetic", "difficulty": 1, "train_count": 64},
    "training": {"lr": 4e-4, "entropy_coeff": 1e-3, "filter_groups": {"enable": False}, "reward": "accuracy"},
}


@dataclass(frozen=True)
class Tried:
    """The fake run of one arm: what it recorded, its curves as they were exported, or why it came to no end.

    `stand_in`: what it ran on where that is not the start of the arm itself.
    """

    stand_in: str = ""
    run: Run | None = None
    exported: Mapping[int, Mapping[str, float]] | None = None
    error: str = ""
    waits: str = ""


_tried: "WeakKeyDictionary[Subject, dict[str, Tried]]" = WeakKeyDictionary()


def tried(subject: Subject) -> dict[str, Tried]:
    """Return the fake run of each arm; they are made once for a subject."""
    if subject not in _tried:
        with _scratch(subject.root) as scratch:
            _tried[subject] = {arm: _try(arm, own, scratch) for arm, own in subject.arms.items()}
    return _tried[subject]


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """Yield a temporary folder of runs that shares the warmed-up models of `root`."""
    with tempfile.TemporaryDirectory(prefix="fp4rl-") as name:
        models = (root / "models").absolute()
        models.mkdir(parents=True, exist_ok=True)
        (Path(name) / "models").symlink_to(models)
        yield Path(name)


def _try(arm: str, experiment: Experiment, scratch: Path) -> Tried:
    linked, why = links(experiment), without_weights(experiment)
    if TEACHER in linked:
        return Tried(waits="it takes weights that another run has yet to train")
    if why is not None and why.startswith(NOT_HERE):
        return Tried(waits=why)
    stand_in = EMBEDDED if why is not None else UNTRAINED if START in linked else ""
    try:
        small = cut(experiment, stand_in=stand_in == EMBEDDED)
    except (UserError, ValueError) as error:
        return Tried(stand_in, waits=f"no small copy of it: {str(error).splitlines()[0]}")
    from fp4rl.lab.work import execute_run  # and with it TRL

    try:
        folder = execute_run(single(small, f"tried-{arm}"), scratch)
        curves = read_tensorboard(folder.path / "tensorboard").steps
        return Tried(stand_in, read_run(folder), curves)
    except (UserError, LookupError) as error:
        # Patterns and layers of a large model need not be those of the one in its place.
        return Tried(stand_in, waits=str(error)) if stand_in == EMBEDDED else Tried(stand_in, error=str(error))
    except CheckFailed as error:
        return Tried(stand_in, error=str(error))
    except Exception as error:  # of a library; a run would keep the traceback in its log
        first = (str(error).splitlines() or ["no message"])[0]
        return Tried(stand_in, error=f"{type(error).__name__}: {first}")


def cut(experiment: Experiment, *, stand_in: bool) -> Experiment:
    """Return the experiment in three steps of few and short answers, in this process."""
    recipe = experiment.training
    prompts, longest = min(recipe.train_batch_size, _PROMPTS), min(recipe.max_response_length, _LONGEST)
    updates = next(number for number in range(min(recipe.updates_per_step, prompts), 0, -1) if prompts % number == 0)
    training: dict[str, Any] = {
        "steps": STEPS,
        "train_batch_size": prompts,
        "mini_batch_size": prompts // updates,
        "micro_batch_size": None,
        "rollout_n": min(recipe.rollout_n, _ANSWERS),
        "max_response_length": longest,
        "save_freq": 0,
        "deployed": "last",
        "filter_groups": {"max_num_gen_batches": min(recipe.filter_groups.max_num_gen_batches, _DRAWS)},
    }
    if (recipe.overlong_buffer.len or 0) >= longest:
        training["overlong_buffer"] = {"len": max(1, longest // 5)}
    evaluation = {
        "count": _JUDGED,
        "test_freq": 0,
        "max_new_tokens": longest,
        "matmul_noise": [],
        "formats": [],
        "kl": False,
    }
    changes: dict[str, Any] = {"training": training, "evaluation": evaluation, "health": {}, "processes": 1}
    changes |= {"sharding": "none", "engine": "trl", "rollout": {"engine": "transformers"}}
    if experiment.injection is not None and (schedule := experiment.injection.schedule) is not None:
        # Every stage within the steps: before in the first one, a blend in the second, the own format in the last.
        soon = {p: {"from_step": min(own.from_step, 1), "over": min(own.over, 1)} for p, own in schedule.points.items()}
        changes["injection"] = {"schedule": soon}
    if isinstance(experiment.task, Arithmetic):  # which makes each of its problems, and checks them against the others
        enough = STEPS * prompts * _DRAWS
        changes["task"] = {"train_count": min(experiment.task.train_count or enough, enough)}
    described = experiment.model_dump(mode="json") | {"health": {}, "rollout": {}}
    described.pop("start", None)
    described = merge(described, changes)
    if stand_in:
        described["task"], described["training"]["rewards"] = {}, []
        described = merge(described, dict(_IN_ITS_PLACE))
    return Experiment.model_validate(described)


def _of_steps(look: Callable[[Run, Tried], Iterator[Row]]) -> Callable[[Subject], Iterator[Row]]:
    def rows(subject: Subject) -> Iterator[tuple[str, Row]]:
        for arm, own in tried(subject).items():
            yield from ((arm, row) for row in (look(own.run, own) if own.run is not None else ()))

    return lambda subject: merged(rows(subject))


def ended(subject: Subject) -> Iterator[Row]:
    """Take the fake steps, which stop themselves where something is wrong, and look for gaps in what they recorded."""
    yield from merged((arm, _end(own)) for arm, own in tried(subject).items())


def _end(own: Tried) -> Row:
    expected = "each step taken, and no gap in its evidence"
    if own.waits:
        return Row("waits", own.waits, expected)
    if own.run is None:
        return Row("fail", own.error, expected)
    where = f" on {own.stand_in}" if own.stand_in else ""
    if own.run.gaps:
        return Row("fail", "; ".join(own.run.gaps), expected)
    calls = sum(own.run.result.evidence.calls.values())
    return Row("pass", f"{STEPS} steps{where}; {counted(calls, 'rounded call')}", expected)


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
    Check("steps", ("P10", "P13", "P24", "P25", "P50"), ended),
    Check("rollouts", ("P06", "P09"), _of_steps(rollouts)),
    Check("noise", ("P03",), _of_steps(noise)),
    Check("spread", ("P25",), _of_steps(spread)),
    Check("live", ("P35",), _of_steps(live)),
    Check("curves", ("P33",), _of_steps(curves)),
)
