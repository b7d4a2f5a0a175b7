"""The folder that a verb starts from: the embedded model's warm-up, what is said of packed weights, `stored`."""

from pathlib import Path
from typing import Any

from fp4rl.cli.described import require_here
from fp4rl.cli.terminal import console, progress, say_once
from fp4rl.lab.matrix import single
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import parse
from fp4rl.spec.model import EMBEDDED, Model
from fp4rl.spec.task import Task

STORED = "stored"


def say_packed(folder: str | Path | None) -> bool:
    """Print on stderr, once, that a folder is packed and what that means; return whether it is."""
    if folder is None or not Path(folder).is_dir():
        return False
    from fp4rl.models.packed.as_served import packed_note

    note = packed_note(Path(folder))
    if note is not None:
        say_once([note])
    return note is not None


def start_of(model: Model, task: Task, runs: Path) -> Path:
    """Return the folder of a model; the embedded one is warmed up on first use, with its progress shown."""
    from fp4rl.rl.inputs import start_folder

    say_packed(model.path)
    total = model.embedded.warm_up_steps if model.embedded is not None else 0
    with progress() as advance:
        return start_folder(model, task, runs / "models", lambda step, _: advance("warm-up", step, total))


def or_embedded(word: str, runs: Path) -> str:
    """Return a word that names a policy as it is; for `embedded` or a larger size of it the folder of that model."""
    if word not in EMBEDDED:
        return word
    started = Experiment.model_validate({"model": word})
    return str(start_of(started.model, started.task, runs))


def with_stored(profiles: dict[str, Any], model: dict[str, str], deployment: str | None) -> dict[str, Any]:
    """Return profiles in which `stored` has a meaning: the inputs of a packed folder rounded as it is served.

    Where it is served with inputs as they are, that is `full`. Raises what `inputs_as_served` does, and
    InvalidValueError for an injection of that name.
    """
    if STORED not in profiles["profiles"]:
        return profiles
    if STORED in profiles["injections"]:
        raise InvalidValueError(f"--precision {STORED}: means a packed folder as it is served; take another name")
    require_here([single(Experiment(model=parse(Model, model, "")), "eval")])
    quiet()
    from fp4rl.models.packed.as_served import inputs_as_served

    served = inputs_as_served(Path(model["path"]), deployment)
    console(stderr=True).print(f"{STORED}: {served.words}", soft_wrap=True)
    if served.injection is not None:
        return profiles | {"injections": profiles["injections"] | {STORED: served.injection}}
    names = ["full" if name == STORED else name for name in profiles["profiles"]]
    return profiles | {"profiles": list(dict.fromkeys(names))}
