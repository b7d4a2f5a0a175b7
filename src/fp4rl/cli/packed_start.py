"""Folders of packed weights on the command line: what is said of them, and the precision `stored`."""

from pathlib import Path
from typing import Any

from fp4rl.cli.described import require_here
from fp4rl.cli.terminal import console, say_once
from fp4rl.lab.matrix import single
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import parse
from fp4rl.spec.model import Model

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
