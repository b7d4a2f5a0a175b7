"""One run of an experiment as a shell script for verl, with the files that it reads beside it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fp4rl.engines.verl import data, hydra
from fp4rl.engines.verl.configuration import Files, configuration
from fp4rl.engines.verl.differences import differences, require_expressible
from fp4rl.engines.verl.limits import require_possible
from fp4rl.engines.verl.machines import Machine
from fp4rl.lab.files import write_whole
from fp4rl.lab.matrix import PlannedRun

VERSION = "0.9.1"
"""The version of verl whose configuration is written."""


@dataclass(frozen=True)
class VerlRun:
    """What verl is asked for: its configuration, the variables of its shell, and what it does in another way."""

    run: PlannedRun
    machine: Machine
    configuration: dict[str, Any]
    variables: dict[str, str]
    differences: tuple[str, ...]

    @property
    def overrides(self) -> tuple[str, ...]:
        """The words behind `python -m verl.trainer.main_ppo`."""
        return hydra.words(self.configuration)

    def script(self) -> str:
        """Return the shell script; words given to it stand last and so win."""
        said = [
            f"# {self.run.run_id} of {self.run.suite}: `fp4rl verl-config`, for verl {VERSION} ({self.machine.name})"
        ]
        said += [f"# - {line}" for line in self.differences]
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.variables.items()]
        command = (
            f'exec "${{PYTHON:-python3}}" -m verl.trainer.main_ppo \\\n{hydra.in_a_shell(self.overrides)} \\\n    "$@"'
        )
        return "\n".join(["#!/usr/bin/env bash", *said, "set -euo pipefail", *exports, command, ""])


def for_verl(run: PlannedRun) -> PlannedRun:
    """Return the run with `engine: verl` in its experiment, which its id is of."""
    return replace(run, experiment=run.experiment.model_copy(update={"engine": "verl"}))


def verl_run(run: PlannedRun, machine: Machine, devices: int | None, files: Files) -> VerlRun:
    """Return one run as verl is asked for it, on `devices` devices (as many processes as the experiment has, else the
    machine's usual number). Raises InvalidValueError for what verl cannot express.
    """
    experiment = run.experiment
    devices = devices or (experiment.processes if experiment.processes > 1 else machine.devices)
    require_expressible(experiment, devices)
    folder = Path(experiment.model.path or "")
    here = folder.is_dir()
    chats = here and getattr(experiment.task, "chat", False)
    first = data.as_seen(experiment, experiment.task.problems("train", 1)) if chats else ()
    template = data.chat_template(folder, first) if here else data.AS_WRITTEN
    said = list(differences(experiment, machine, devices))
    if not here:
        said.append(f"{folder} is not on this machine: what its tokenizer puts before a prompt was not looked at")
    keys = configuration(run, machine, devices, files, template)
    require_possible(experiment, lambda key: keys.get(key, keys.get(f"+{key}")))
    return VerlRun(run, machine, keys, dict(machine.variables), tuple(said))


def write_run(request: VerlRun, files: Files) -> Sequence[Path]:
    """Write the script, the problems and the experiment; return the files.

    Raises InvalidValueError for prompts that are too long or that verl would tokenize otherwise.
    """
    experiment = request.run.experiment
    learned, judged = data.splits(experiment)
    data.chat_template(Path(experiment.model.path or ""), (*learned[:1], *judged[:1]))
    data.write(learned, experiment.task.name, files.train)
    data.write(judged, experiment.task.name, files.validation)
    write_whole(files.spec, yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))
    write_whole(files.script, request.script())
    return files.script, files.train, files.validation, files.spec
