"""From the words of `fp4rl scan` to a model, its texts, and the injection to scan."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fp4rl.cli.described import described_by, is_spec, require_here, run_described, source_of
from fp4rl.cli.injections import injections_by_name
from fp4rl.cli.terminal import say_once
from fp4rl.lab.matrix import PlannedRun, single
from fp4rl.lab.stages import at_start
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest, shown
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import arm_content, change_of, former_words, merge, parse, read_spec
from fp4rl.spec.model import embedded
from fp4rl.spec.retarget import in_format, under_deployment
from fp4rl.spec.scan import ScanRequest

DEFAULT_MODE = "w4a16"
OF_A_MODEL = ("model", "task", "injection")  # keys of an experiment that can be given without a spec file
_ARM = ", arm "  # between a suite's file and the arm that is scanned


@dataclass(frozen=True)
class ScanTarget:
    """What is scanned: its name in the report, its experiment, the request, and the injection."""

    source: str
    name: str
    experiment: Experiment
    request: ScanRequest
    injection: Injection

    def run_with(self, file: Path) -> str:
        """Return the command that runs the scanned spec with a file of advice."""
        if not is_spec(self.source):
            return f"fp4rl run SPEC +{file}; for one arm of a suite: arms.NAME=+{file}"
        _, _, arm = self.name.partition(_ARM)
        return f"fp4rl run {self.source} {f'arms.{arm}=' if arm else ''}+{file}"


def targets_of(source: str, words: Sequence[str], injections: Sequence[str], runs: Path) -> list[ScanTarget]:
    """Read a model folder, the word `embedded` or a spec file, with `key=value` words, once for each injection, or with
    its own.

    An arm that starts from a run below `runs` has the weights of that run. Raises InvalidValueError for a wrong key or
    value, NotFoundError for a file or a run that is not on this machine.
    """
    named = injections_by_name(injections, "--injection")
    if stray := [word for word in words if named and re.match(r"injection[.=]", word)]:
        raise InvalidValueError(f"{stray[0]} and --injection both say what is scanned; drop one")
    target = described(source, words, runs)
    if not named:
        return [target]
    own = {name: parse(Injection, _as_mapping(content), f"--injection {name}") for name, content in named.items()}
    if idle := [name for name, each in own.items() if each.is_nothing]:
        raise InvalidValueError(f"--injection {idle[0]}: rounds nothing, so there is nothing to scan; name a mode")
    return [
        replace(
            target,
            name=f"{target.name}, {name}" if len(own) > 1 else target.name,
            injection=_injection(target.request, target.experiment.model_copy(update={"injection": each})),
        )
        for name, each in own.items()
    ]


def _as_mapping(content: Any) -> Any:
    return {"mode": content} if isinstance(content, str) else content


def described(source: str, words: Sequence[str], runs: Path = Path("runs")) -> ScanTarget:
    """Return what is scanned without an injection beside the words. Raises what `targets_of` does."""
    say_once(former_words(None, words))
    requested, change, of_suite = _sorted(words, is_spec(source))
    request = parse(ScanRequest, requested, "")
    if request.weights_only and "task" in change:
        raise InvalidValueError("task names what to calibrate on, and weights_only never loads the model; drop one")
    if request.text is not None and "task" in change:
        raise InvalidValueError(f"text {request.text} and task both name what to calibrate on; drop one")
    if "injection" in change and change["injection"] in ("none", None):
        raise InvalidValueError("injection=none rounds nothing, so there is nothing to scan; name a mode such as w4a16")
    if is_spec(source):
        run = _of_spec(source, change, of_suite, request.arm, runs)
    else:
        run = _of_model(source, change, request.arm)
    require_here([run])
    path = run.experiment.model.path
    if path is not None and not any((Path(path) / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise NotFoundError(f"model folder {path!r} has no config.json; is it a Hugging Face model folder?")
    return ScanTarget(source, _name(source, run), run.experiment, request, _injection(request, run.experiment))


def _sorted(words: Sequence[str], of_spec: bool) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Split the words into keys of the scan, keys of the experiment, and words for the suite's file."""
    known = [*ScanRequest.model_fields, *Experiment.model_fields, *(Suite.model_fields if of_spec else ())]
    requested, change, of_suite = dict[str, Any](), dict[str, Any](), list[str]()
    for word in words:
        changed = change_of(word)
        keys = {key: str(key).partition(".")[0] for key in changed}
        for head in keys.values():
            if head not in known:
                raise InvalidValueError(f"unknown key {shown(head)}{nearest(head, known)}")
        if of_spec and set(keys.values()) <= set(Suite.model_fields):
            of_suite.append(word)
            continue
        for key, head in keys.items():
            if head in ScanRequest.model_fields:
                requested = merge(requested, {key: changed[key]})
            else:
                change = merge(change, {key: changed[key]})
    return requested, change, of_suite


def _of_spec(source: str, change: Mapping[str, Any], of_suite: list[str], arm: str | None, runs: Path) -> PlannedRun:
    """Return one arm of a suite, or an experiment, in the weights that it starts from, with the changes applied."""
    run = run_described(source, of_suite, arm)
    started = run.experiment if "model" in change else at_start(run, runs)
    if not change:
        return replace(run, experiment=started)
    suite = described_by(Path(source), of_suite)
    content = arm_content(suite, run.arm) if isinstance(suite, Suite) else read_spec(source_of(Path(source)).path)
    experiment = parse(Experiment, _with_task(content, change), source)
    if "model" not in change:
        experiment = experiment.model_copy(update={"model": started.model, "start": None})
    return PlannedRun(run.suite, run.arm, run.seed, experiment)


def _with_task(content: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` with `change`; another task keeps no key of the former one."""
    task = change.get("task")
    if isinstance(task, Mapping) and "name" in task and task["name"] != (content.get("task") or {}).get("name"):
        content = {key: value for key, value in content.items() if key != "task"}
    return merge(content, change)


def _of_model(source: str, change: Mapping[str, Any], arm: str | None) -> PlannedRun:
    stray = [*(["arm"] if arm else []), *(key for key in change if key not in OF_A_MODEL)]
    if stray:
        raise InvalidValueError(
            f"{source} is no spec file, so {stray[0]} has nothing to change; keys of {', '.join(OF_A_MODEL)} act"
        )
    model = embedded(source) or {"path": source}
    content = merge({"model": {**model, "dtype": "float32"}, "task": {"name": "arithmetic"}}, change)
    injection = content.pop("injection", None)  # by itself: a scan takes what no run would
    experiment = parse(Experiment, content, "")
    if injection is not None:
        experiment = experiment.model_copy(update={"injection": parse(Injection, injection, "injection")})
    return single(experiment, source)


def _name(source: str, run: PlannedRun) -> str:
    """Return the name for the report; a run's final model is called by its run, since its folder is always `final`."""
    path = Path(source).resolve()
    if is_spec(source):
        return f"{path.name}{_ARM}{run.arm}" if run.arm != "run" else path.name
    return f"{path.parent.name}/{path.name}" if path.name == "final" else path.name


def _injection(request: ScanRequest, experiment: Experiment) -> Injection:
    """Return the experiment's injection, else W4A16, with the requested format, deployment and patterns."""
    injection = experiment.injection or Injection.named(DEFAULT_MODE)
    if request.format is not None:
        injection = in_format(injection, request.format)
    if request.deployment is not None:
        injection = under_deployment(injection, request.deployment)
    return injection.model_copy(update={"targets": injection.targets.leaving(request.leave)})
