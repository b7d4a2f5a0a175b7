"""Checks of the machine: files, room and rights on disk, memory, loggers, and what is there of these runs already."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path

from fp4rl.lab.estimates import available, memory_of
from fp4rl.lab.preflight.rows import Check, Row, Subject, Verdict
from fp4rl.lab.provenance import missing_files
from fp4rl.lab.suites import statuses_of
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.training import OPTIMIZERS_OF
from fp4rl.spec.words import counted

_LEAST = 64 * 2**20  # bytes of a run of the embedded model, with its items, curves and weights
_WANDB = "api.wandb.ai"


def files(subject: Subject) -> Iterator[Row]:
    """Name each path of the description that is not on this machine."""
    missing, expected = missing_files(subject.runs), "every path that is named exists here"
    for line in missing:
        what, _, cure = line.partition("; ")
        yield Row("fail", what, expected, cure)
    if not missing:
        paths = subject.each(lambda own: ", ".join(filter(None, (own.model.path, *own.task.files.values()))))
        yield Row("pass", f"here: {paths}" if paths else "no file outside the package is needed", expected)


def room(subject: Subject) -> Iterator[Row]:
    """Write a file where runs go, and hold the free space against what their weights will take."""
    home = subject.root
    while not home.exists() and home != home.parent:
        home = home.parent
    expected = "a folder that can be written"
    try:
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        yield Row("fail", f"{home}: {error.strerror}", expected, "name another place with --runs")
        return
    sizes = [_size(own) for own in subject.arms.values()]
    needed = sum(size or _LEAST for size in sizes) * max(1, len({run.seed for run in subject.runs}))
    free = shutil.disk_usage(home).free
    short: Verdict = "fail" if all(sizes) else "warn"  # where a size is a guess, nobody is stopped for it
    verdict: Verdict = short if free < needed else "warn" if free < 2 * needed else "pass"
    cure = "" if verdict == "pass" else "make room, fewer seeds at a time, or save_total_limit 1"
    measured = f"{_gib(free)} GiB free at {home}"
    yield Row(verdict, measured, f"{_gib(needed)} GiB for weights and checkpoints", cure)


def _size(experiment: Experiment) -> int | None:
    """Return how many bytes a run leaves, in final weights and checkpoints; None where that is not known."""
    memory = memory_of(experiment)
    if memory is None:
        return None
    parts = dict(memory.parts)
    recipe = experiment.training
    state = sum(parts.get(name, 0.0) for name in ("adapter", "FP32 masters", "average", "optimizer"))
    kept = recipe.save_total_limit if recipe.save_freq else 1  # one against interruptions, while it runs
    return int(parts["weights"] + kept * (parts["weights"] + state))


def memory(subject: Subject) -> Iterator[Row]:
    """Hold the bytes of weights, gradients and optimizer against the memory of the device."""
    sizes = {arm: memory_of(own) for arm, own in subject.arms.items()}
    known = {arm: each for arm, each in sizes.items() if each is not None}
    here = available() if known else None
    if here is None:
        return
    arm, largest = max(known.items(), key=lambda pair: pair[1].whole)
    verdict: Verdict = "warn" if largest.whole > here[1] else "pass"
    cure = "a LoRA adapter, sharding: fsdp2 over several processes, or another machine" if verdict == "warn" else ""
    yield Row(
        verdict, f"{_gib(largest.whole)} GiB in {arm}, before activations", f"{_gib(here[1])} GiB of {here[0]}", cure
    )


def folders(subject: Subject) -> Iterator[Row]:
    """Look at what is there of these runs: a finished folder is never written again, a damaged one is named."""
    states = statuses_of(subject.runs, subject.root).values()
    expected = "ids of the description, one folder each"
    if doubled := len(subject.runs) - len({(run.suite, run.run_id) for run in subject.runs}):
        yield Row("fail", f"{counted(doubled, 'run')} would write into a folder of another", expected, "rename an arm")
    bad = sum(status.word in ("damaged", "invalid") for status in states)
    finished = sum(status.finished for status in states)
    cure = "`fp4rl runs` names them" if bad else ""
    measured = f"{counted(len(states), 'run')}, {finished} finished, {bad} damaged"
    yield Row("warn" if bad else "pass", measured, expected, cure)


def loggers(subject: Subject) -> Iterator[Row]:
    """Look for the package of each logger, and for the key without which W&B would ask for one."""
    expected = "packages, and a key where one is needed"
    for name in subject.report_to:
        if find_spec(name) is None:
            yield Row("fail", f"{name} is not installed", expected, f"pip install 'fp4rl[{name}]'")
        elif name == "wandb" and not _wandb_key():
            cure = "`wandb login`, WANDB_API_KEY, or WANDB_MODE=offline"
            yield Row("fail", "wandb has no key", expected, cure)
        else:
            yield Row("pass", f"{name} is here", expected)


def _wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    try:
        return netrc(os.environ.get("NETRC") or str(Path.home() / ".netrc")).authenticators(_WANDB) is not None
    except (OSError, NetrcParseError):
        return False


def packages(subject: Subject) -> Iterator[Row]:
    """Look for what trains: TRL, verl in its own environment, and the package of the optimizer."""
    needed = {"trl": "train"} if any(own.engine == "trl" for own in subject.arms.values()) else {}
    optimizers = {OPTIMIZERS_OF.get(own.training.optimizer) for own in subject.arms.values()}
    needed |= {name: "oracles" if name == "torchao" else name for name in optimizers if name is not None}
    missing = [name for name in needed if find_spec(name) is None]
    for name in missing:
        yield Row("fail", f"{name} is not installed", "what trains is installed", f"pip install {name}")
    if needed and not missing:
        yield Row("pass", f"{', '.join(needed)} installed", "what trains is installed")


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


CHECKS = (
    Check("files", ("P28",), files),
    Check("room", ("P28",), room),
    Check("memory", ("P28",), memory),
    Check("folders", ("P27",), folders),
    Check("loggers", ("P28",), loggers),
    Check("packages", ("P28",), packages),
)
