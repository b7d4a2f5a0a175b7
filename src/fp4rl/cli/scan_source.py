"""From what stands on the command line of `fp4rl scan` to a model, its texts, and what is to be rounded in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4rl.cli.described import asked_task, runs_of
from fp4rl.spec.door import parse
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.mistakes import BadValue, NotThere, nearest
from fp4rl.spec.modes import MODES
from fp4rl.spec.targets import LEFT_BY_DEFAULT

if TYPE_CHECKING:
    from fp4rl.diagnose.calibration import Calibration

DEFAULT_MODE = "w4a16"
POINTS = ("weight", "input", "output")


@dataclass(frozen=True)
class Wish:
    """What is to be rounded, as said on the command line; None where nothing was said."""

    mode: str | None
    format: str | None
    preset: str | None
    leave: Sequence[str]


def described(model: str, task: str, data: Path | None, dtype: str | None) -> Experiment:
    """The experiment that `model` stands for: a folder, the word `embedded`, or a spec file (a suite's first arm that
    rounds something, else its first)."""
    if Path(model).suffix in (".yaml", ".yml") or Path(model).parent.name == "catalogue":
        runs = runs_of(Path(model), [f"model.dtype={dtype}"] if dtype else [])
        return next((run.experiment for run in runs if run.experiment.injection), runs[0].experiment)
    source: dict[str, Any] = {"embedded": {}} if model == "embedded" else {"path": model}
    return parse(Experiment, {"model": {**source, "dtype": dtype or "float32"}, "task": asked_task(task, data)}, "")


def injection_of(wish: Wish, experiment: Experiment) -> Injection:
    """The wish, or the experiment's own injection when there is no wish, or W4A16."""
    plain = wish.mode is None and wish.format is None and wish.preset is None
    if plain and experiment.injection is not None:
        targets = experiment.injection.targets
        changed = targets.model_copy(update={"leave": (*targets.leave, *wish.leave)})
        return experiment.injection.model_copy(update={"targets": changed})
    mode = wish.mode or DEFAULT_MODE
    if mode not in MODES:
        raise NotThere(f"no mode is called {mode!r}{nearest(mode, MODES)}")
    places = {point: wish.format for point in POINTS if wish.format and getattr(MODES[mode], point)}
    if wish.format and not places:
        raise BadValue(f"mode {mode} rounds nothing, so --format {wish.format} has no place; name another mode")
    leave = {"leave": [*LEFT_BY_DEFAULT, *wish.leave]}
    content = {"preset": wish.preset, "targets": leave, **(places or {"mode": mode})}
    return parse(Injection, content, "")


def loaded(experiment: Experiment, text: Path | None, texts: int, runs: Path) -> tuple[Any, "Calibration"]:
    """The live model, and the texts that it is fed: of the file, or of the experiment's task."""
    from fp4rl.models.quiet import quiet

    quiet()
    from fp4rl.diagnose.calibration import calibrate, texts_of
    from fp4rl.models.load import load
    from fp4rl.rl.start import start_folder, task_of

    task = task_of(experiment.task)
    found = texts_of(text) if text else [f"{p.prompt} {p.solution}" for p in task.problems("train", texts)]
    model, tokenizer = load(start_folder(experiment.model, task, runs / "models"), experiment.model.dtype)
    return model, calibrate(tokenizer, found)


def folder_of(experiment: Experiment) -> str:
    """The folder whose files hold the weights; BadValue for the embedded model, which has none until it is made."""
    if experiment.model.path is None:
        raise BadValue("--weights-only reads a model folder; the embedded model is scanned without it")
    return experiment.model.path
