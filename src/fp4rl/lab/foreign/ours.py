"""Any log as the monitor takes it: another trainer's, or that of a run of ours with its evaluations."""

from pathlib import Path

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.foreign.joined import Joined
from fp4rl.lab.foreign.reader import read_log
from fp4rl.spec.errors import InvalidValueError

_METRICS = "metrics.jsonl"


def read_steps(log: Path) -> tuple[str, Joined]:
    """(kind of log, its numbers). A run of ours gets its evaluations as `accuracy/validation`.

    Raises NotFoundError and InvalidValueError for what cannot be read.
    """
    folder = log.parent if log.name == _METRICS else log
    if not (folder / _METRICS).is_file():
        return read_log(log)
    _, joined = read_log(folder / _METRICS)
    run = RunFolder(folder)
    for step, accuracy in (_validations(run) if run.finished else {}).items():
        joined.steps.setdefault(step, {})["accuracy/validation"] = accuracy
    return "fp4rl", joined


def _validations(run: RunFolder) -> dict[int, float]:
    """Step -> strict accuracy at the precision the policy samples in; other profiles are no validation."""
    found: dict[int, float] = {}
    try:
        evaluations = [(e["profile"]["name"], int(e["step"]), float(e["strict"])) for e in run.result()["evaluations"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidValueError(
            f"{run.path / 'result.json'} is damaged: its evaluations cannot be read ({error!r})"
        ) from None
    for name in ("full", "deployment"):  # the second overrides the first
        found |= {step: strict for profile, step, strict in evaluations if profile == name}
    return found
