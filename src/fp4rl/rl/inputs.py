"""What a run is made from besides its description: the start model, and digests of all that the description points to.

Digests are stored in every checkpoint and with the result. No torch is imported: comparisons of runs use them too.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fp4rl.models.transforms.note import note_of
from fp4rl.rl.reward_code import sources
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.linked import START, TEACHER, links
from fp4rl.spec.model import Embedded, Model
from fp4rl.spec.task import Task
from fp4rl.tasks.arithmetic import Arithmetic

# Input -> the keys that point to it: where one is a declared factor, the contents may differ too.
POINTERS = {
    "start model": ("model", START),
    "untransformed model": ("model", START),
    "teacher": (TEACHER,),
    "problems": ("task",),
    "reward's source": ("training.reward",),
    "rewards' sources": ("training.rewards",),
    "number of processes": ("processes",),
}

OnWarmUp = Callable[[int, float], None]
"""Called with (step, loss)."""


@dataclass(frozen=True)
class Shelf:
    """A folder where runs that begin with the same model keep its evaluations. `origin`: the code and the versions that
    numbers depend on, by name."""

    folder: Path
    origin: Mapping[str, str]


@dataclass(frozen=True)
class Stages:
    """What other runs have made: folders of models that they trained, `start`, in place of the model's own weights, and
    `teacher`; and the evaluations of starts.

    `transformed`: the start went through the transforms of `model` before it was trained.
    """

    start: Path | None = None
    teacher: Path | None = None
    transformed: bool = False
    evaluations: Shelf | None = None


ALONE = Stages()

_read: dict[tuple[Path, int, int], str] = {}
_demonstrations = lru_cache(maxsize=2)(Arithmetic.demonstrations)  # the same for every run of a suite


def start_folder(
    model: Model, task: Task, cache: Path, on_warm_up: OnWarmUp | None = None, stages: Stages = ALONE
) -> Path:
    """Return the folder that training starts from.

    The embedded model is warmed up on first use, and a model is transformed; both are kept in `cache`. Raises
    InvalidValueError for a model that cannot be transformed, CheckFailed where a transform changes its function.
    """
    named = Path(model.path) if model.path is not None else None
    folder = stages.start or named or warmed_up(model.embedded or Embedded(), task, cache, on_warm_up)
    if not model.transforms or stages.transformed:
        return folder
    from fp4rl.models.transforms.start import transformed

    def texts(count: int) -> list[str]:
        return [f"{problem.prompt} {problem.solution}" for problem in task.problems("train", count)]

    return transformed(folder, of_model(folder), model, texts, cache)


def warmed_up(embedded: Embedded, task: Task, cache: Path, on_warm_up: OnWarmUp | None = None) -> Path:
    """Return the folder of the embedded model after its warm-up on sloppy arithmetic, whatever the task of the run."""
    from fp4rl.models.tiny import cached

    teacher = task.model_copy(update={"train_count": None}) if isinstance(task, Arithmetic) else Arithmetic()
    return cached(cache, embedded, _demonstrations(teacher, embedded.examples_needed), on_warm_up)


def teacher_folder(experiment: Experiment, stages: Stages) -> Path | None:
    """Return the folder of a teacher that is neither the start nor the live model; None for these."""
    path = getattr(links(experiment).get(TEACHER), "path", None)
    return Path(path) if path is not None else stages.teacher


def inputs(experiment: Experiment, start: Path, teacher: Path | None = None) -> dict[str, str]:
    """Return name -> twelve hex digits: of the model that training starts from (`start`), as it was before transforms
    too, of a `teacher` of its own, of the file of problems and of the source of a reward function of the user's own."""
    taught = {} if teacher is None else {"teacher": of_model(teacher)}
    note = note_of(start)
    before = {} if note is None or note.of is None else {"untransformed model": note.of}
    return {"start model": of_model(start), **before, **taught, **pointed_at(experiment)}


def require_unchanged(then: Mapping[str, str], now: Mapping[str, str], step: int, checkpoints: Path) -> None:
    """Raise InvalidValueError where the checkpoint of `step` was trained on other contents than those `now`: the run
    would train on both and record only the new ones."""
    changed = (name for name in POINTERS if then.get(name) != now.get(name))
    others = [f"{name} ({' or '.join(POINTERS[name])})" for name in changed]
    if others:
        raise InvalidValueError(
            f"changed since the checkpoint after step {step} was written: {', '.join(others)}; "
            f"put it back as it was, or delete {checkpoints} to start over with what is there now"
        )


def of_model(folder: Path) -> str:
    """Return the digest of a model's files (weights, settings, tokenizer, no notes), those of an adapter's base too."""
    parts = list(_parts(folder))
    settings = folder / "adapter_config.json"
    if settings.is_file():
        base = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
        parts += _parts(Path(base)) if base and Path(base).is_dir() else []
    return _of_files(parts)


def pointed_at(experiment: Experiment) -> dict[str, str]:
    """Return the digests that are known without a start model."""
    digests = {}
    if (teacher := teacher_folder(experiment, ALONE)) is not None:
        digests["teacher"] = of_model(teacher)
    if files := experiment.task.files:
        digests["problems"] = _of_files(Path(path) for path in files.values())
    recipe = experiment.training
    if source := [file for reward in recipe.all_rewards for file in sources(reward.name)]:
        digests["rewards' sources" if recipe.rewards else "reward's source"] = _of_files(source)
    return digests


def _parts(folder: Path) -> Iterator[Path]:
    return (
        path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".md" and path.name[0] != "."
    )


def _of_files(paths: Iterable[Path]) -> str:
    """Return the digest of the names and contents of files."""
    files = "".join(f"{path.name}\n{_of_file(path)}\n" for path in paths)
    return hashlib.sha256(files.encode()).hexdigest()[:12]


def _of_file(path: Path) -> str:
    """Return the SHA-256 of a file; kept, so that a large model is read once a process, not once a run."""
    stat = path.stat()
    key = path, stat.st_size, stat.st_mtime_ns
    if key not in _read:
        with path.open("rb") as file:
            _read[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _read[key]
