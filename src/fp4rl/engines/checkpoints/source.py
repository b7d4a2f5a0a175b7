"""What is exported: a run's final policy or a model folder, the injection that is baked in, and how it was judged."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp4rl.engines.checkpoints.layouts.layout import Layout
from fp4rl.inject.plan import SiteTable
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.meant import run_meant
from fp4rl.lab.runs import Run, read_run
from fp4rl.rl.inputs import of_model
from fp4rl.rl.profiles import precision_named
from fp4rl.spec.deployment import deployment_named
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.evidence import Evaluation
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import change_of, merge, parse
from fp4rl.spec.points import LINEAR_POINTS, MODES
from fp4rl.spec.retarget import under_deployment


@dataclass(frozen=True)
class Source:
    """The folder of a policy, and the injection under which it is deployed. `run` is None for a model folder."""

    folder: Path
    injection: Injection
    run: Run | None = None

    @property
    def name(self) -> str:
        """The run's key, or the folder's name."""
        return self.run.key if self.run else self.folder.resolve().name

    def judged(self, table: SiteTable) -> tuple[Evaluation, ...]:
        """Return the last evaluations of the run that were made of these very sites, formats, rules and merges."""
        last = self.run.evaluations().values() if self.run else ()
        digest = table.digest_in("evaluation")
        return tuple(each for each in last if each.profile.sites_digest == digest)

    def changed(self) -> str | None:
        """Return what says that the policy is not the one that the run evaluated; None where nothing does."""
        written = self.run.result.evidence.final_files if self.run else None
        if self.run is None or written is None or (now := of_model(self.folder)) == written:
            return None
        return f"{self.folder} was changed after {self.name} was evaluated: its files hash to {now}, recorded {written}"

    def not_judged(self, table: SiteTable) -> str | None:
        """Return why the run's accuracy says nothing about this export; None where it does, or there is no run."""
        if self.run is None or self.judged(table):
            return None
        judged = [
            f"{e.profile.name} ({e.profile.precision or 'not recorded'})" for e in self.run.evaluations().values()
        ]
        return f"{self.name} was not evaluated as it would be exported, but as {', '.join(judged) or 'nothing'}"


def source_of(
    what: str, runs: Path, mode: str | None, deployment: str | None, layout: Layout, changes: Sequence[str] = ()
) -> Source:
    """Return what a run's name or folder, or a model folder, stands for.

    A run is exported as it was trained; `mode` and `deployment` change that, and one that rounds nothing needs a mode.
    A model folder is rounded in its own dtype, as packers do, in the layout's usual mode and deployment where none is
    named. `changes` are laid over either: `injection.targets.leave=[...]`, or `+file.yaml`, such as `fp4rl scan` writes
    with --calibrate and --advise. Raises NotFoundError for what is neither, CheckFailed for a run that failed,
    InvalidValueError for a run without a policy and for a change that makes no sense.
    """
    if mode is not None and (mode not in MODES or MODES[mode].weight is None):
        rounding = [name for name, each in MODES.items() if each.weight is not None]
        raise NotFoundError(f"--mode {mode}: no mode with rounded weights is called so{nearest(mode, rounding)}")
    if deployment is not None:
        deployment_named(deployment)
    folder, run = policy_of(what, runs)
    if run is not None:
        own = injection_of(run, mode, deployment)
    else:
        dtype = {"dtype": name} if (name := dtype_of(folder)) else {}
        own = Injection.named(mode or layout.mode, deployment or layout.deployment, **dtype)
    given = {"mode": mode, "deployment": deployment}
    for word in changes:
        own = _changed(own, word, {key: value for key, value in given.items() if value is not None})
    return Source(folder, layout.deployed(own), run)


def _changed(own: Injection, word: str, given: Mapping[str, str]) -> Injection:
    """Return the injection with a change laid over it, which may not contradict the options that were `given`."""
    said = merge({}, change_of(word))
    change = said.get("injection")
    if not isinstance(change, Mapping) or (len(said) > 1 and not word.startswith("+")):
        raise InvalidValueError(f"{word}: an export takes keys of `injection`, such as injection.targets.leave=[...]")
    for key, value in given.items():
        if change.get(key, value) != value:
            raise InvalidValueError(f"--{key} {value}, but {word} says {key} {change[key]}; name one of them")
    content = own.model_dump(mode="json")
    if "mode" in change:  # which says the formats anew
        content = {key: value for key, value in content.items() if key not in (*LINEAR_POINTS, "by_pattern")}
    elif "deployment" in change:
        content = under_deployment(own, str(change["deployment"])).model_dump(mode="json")
    if "mode" not in change and any(point in change for point in LINEAR_POINTS):
        content["mode"] = None
    return parse(Injection, merge(content, change), word)


def policy_of(what: str, runs: Path) -> tuple[Path, Run | None]:
    """Return the folder of the policy that is meant, and the run that made it, None for a model folder.

    Raises what `source_of` raises for a name.
    """
    run = run_meant(what, runs)
    if run is None:
        return Path(what), None
    final = RunFolder(run).path / "final"
    if not final.is_dir():
        raise InvalidValueError(
            f"{run} keeps no policy (there is no folder {final}); run it again, or name a model folder"
        )
    return final, read_run(RunFolder(run), curves=False)


def injection_of(run: Run, mode: str | None, deployment: str | None) -> Injection:
    """Return what a run is deployed under: its own injection, or that of another mode or deployment."""
    if not run.spec:
        raise InvalidValueError(f"{run.key} is a foreign log without a description; name its model folder")
    experiment = Experiment.model_validate(dict(run.spec))
    own = experiment.injection
    if mode is not None and (own is None or mode != own.checkpoint_mode):
        own = precision_named(mode, experiment.evaluation, own).injection
    if own is None or not any(getattr(row, "weight", None) for row in (own, *own.by_pattern)):
        raise InvalidValueError(f"{run.key} trained without rounded weights; name what to export with --mode")
    return own if deployment is None else under_deployment(own, deployment)


def dtype_of(folder: Path) -> str | None:
    """Return the dtype that a model folder names; None where it names none that weights are rounded in."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    parts = [config, *(config[key] for key in ("text_config",) if isinstance(config.get(key), dict))]
    named = [part.get("dtype") or part.get("torch_dtype") for part in parts]
    return next((str(dtype) for dtype in named if dtype in ("float32", "bfloat16", "float16")), None)
