"""From what stands on the command line of `fp4rl scan` to a model, its texts, and what is to be rounded in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4rl.cli.described import asked_task, is_spec, refuse_words_for_a_spec, require_here, run_described
from fp4rl.lab.matrix import PlannedRun, single
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import parse
from fp4rl.spec.modes import MODES
from fp4rl.spec.retarget import in_format, under_preset
from fp4rl.spec.targets import LEFT_BY_DEFAULT

if TYPE_CHECKING:
    from fp4rl.diagnose.calibration import Calibration

DEFAULT_MODE = "w4a16"
_ARM = ", arm "  # between a suite's file and the arm of it that is scanned


@dataclass(frozen=True)
class Source:
    """The model as it was named, with the words for a spec file, and the options that take a spec's place."""

    model: str
    overrides: Sequence[str]
    arm: str | None
    task: str | None
    data: Path | None
    dtype: str | None


@dataclass(frozen=True)
class ScanRequest:
    """What is to be rounded, as said on the command line; None where nothing was said."""

    mode: str | None
    format: str | None
    preset: str | None
    leave: Sequence[str]


def described(source: Source) -> tuple[str, Experiment]:
    """What the report calls the model, and the experiment that it stands for: a folder, the word `embedded`, or one arm
    of a spec file. Raises NotFoundError where a file that it names is not on this machine."""
    run = _of_spec(source) if is_spec(source.model) else _of_model(source)
    require_here([run])
    path = run.experiment.model.path
    if path is not None and not any((Path(path) / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise NotFoundError(f"model folder {path!r} has no config.json; is it a Hugging Face model folder?")
    return _name(source.model, run), run.experiment


def _of_spec(source: Source) -> PlannedRun:
    run = run_described(source.model, list(source.overrides), source.arm)
    content = run.experiment.model_dump(mode="json")
    if source.dtype is not None:
        content["model"]["dtype"] = source.dtype
    if source.task is not None or source.data is not None:
        content["task"] = asked_task(source.task, source.data)
    return PlannedRun(run.suite, run.arm, run.seed, parse(Experiment, content, ""))


def _of_model(source: Source) -> PlannedRun:
    refuse_words_for_a_spec(source.model, list(source.overrides), source.arm)
    model: dict[str, Any] = {"embedded": {}} if source.model == "embedded" else {"path": source.model}
    content = {"model": {**model, "dtype": source.dtype or "float32"}}
    task = asked_task(source.task or "arithmetic", source.data)
    return single(parse(Experiment, content | {"task": task}, ""), source.model)


def _name(model: str, run: PlannedRun) -> str:
    """What the report calls it; the model that a run ends with is `final` in every run."""
    place = Path(model).resolve()
    if is_spec(model):
        return f"{place.name}{_ARM}{run.arm}" if run.arm != "run" else place.name
    return f"{place.parent.name}/{place.name}" if place.name == "final" else place.name


def injection_of(wish: ScanRequest, experiment: Experiment) -> Injection:
    """The experiment's own injection, or W4A16 where it has none, under what the wish changes in it.

    A mode takes the place of the whole injection; a format and a preset change what is there.
    """
    if wish.mode is not None and wish.mode not in MODES:
        raise NotFoundError(f"no mode is called {wish.mode!r}{nearest(wish.mode, MODES)}")
    own = experiment.injection if wish.mode is None else None
    found = own or parse(Injection, {"mode": wish.mode or DEFAULT_MODE, "targets": {"leave": LEFT_BY_DEFAULT}}, "")
    if wish.format is not None:
        found = in_format(found, wish.format)
    if wish.preset is not None:
        found = under_preset(found, wish.preset)
    changed = found.targets.model_copy(update={"leave": (*found.targets.leave, *wish.leave)})
    return found.model_copy(update={"targets": changed})


def replaced(wish: ScanRequest, experiment: Experiment) -> str | None:
    """What a mode on the command line throws out of a spec, in words; None where nothing is."""
    if wish.mode is None or experiment.injection is None:
        return None
    return f"--mode {wish.mode} takes the place of the spec's injection, {experiment.injection.name}"


def takes_advice(model: str, name: str) -> str:
    """The command that lays a file of advice, {}, over what was scanned under this name."""
    if not is_spec(model):
        return "fp4rl run SPEC +{0}; for one arm of a suite: arms.NAME=+{0}"
    _, _, arm = name.partition(_ARM)
    return f"fp4rl run {model} arms.{arm}=+{{0}}" if arm else f"fp4rl run {model} +{{0}}"


def loaded(experiment: Experiment, lines: list[str] | None, texts: int, runs: Path) -> tuple[Any, "Calibration"]:
    """The live model, and the texts that it is fed: the lines given, or so many of the experiment's task."""
    from fp4rl.models.quiet import quiet

    quiet()
    from fp4rl.diagnose.calibration import calibrate
    from fp4rl.models.load import load
    from fp4rl.rl.start import start_folder

    task = experiment.task
    found = lines or [f"{p.prompt} {p.solution}" for p in task.problems("train", texts)]
    model, tokenizer = load(start_folder(experiment.model, task, runs / "models"), experiment.model.dtype)
    return model, calibrate(tokenizer, found)


def folder_of(experiment: Experiment) -> str:
    """The folder whose files hold the weights; InvalidValueError for the embedded model, which has none until it is
    made."""
    if experiment.model.path is None:
        raise InvalidValueError("--weights-only reads a model folder; the embedded model is scanned without it")
    return experiment.model.path
