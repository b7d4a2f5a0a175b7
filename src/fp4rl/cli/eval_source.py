"""From the words of `fp4rl eval` to the experiment that it evaluates: a folder with a task, or a run's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fp4rl.cli.described import is_spec, runs_of
from fp4rl.cli.eval_profiles import asked_profiles
from fp4rl.cli.injections import words_in
from fp4rl.cli.packed_start import with_stored
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.meant import run_meant
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest, shown
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.former_names import with_present_names
from fp4rl.spec.load import change_of, merge, parse
from fp4rl.spec.task_registry import TASKS

# The robustness sweep of a checkpoint: relative errors in every matmul, and formats of the weights.
_SWEEP = {"matmul_noise": (0.0, 0.01, 0.02, 0.05, 0.1), "formats": ("bf16", "mxfp8", "nvfp4", "mxfp4")}


@dataclass(frozen=True)
class Source:
    """What is evaluated: a model folder, and the description that judges it: of the run `name` that it is of, or of a
    `--task` with more than a name."""

    folder: Path
    own: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def model(self, dtype: str | None) -> dict[str, Any]:
        """Return the key `model` of an experiment: this folder, read as the run's model was."""
        own = self.own.get("model") or {}
        experts = own.get("experts_implementation")
        model = {"path": str(self.folder), "dtype": dtype or own.get("dtype") or "float32"}
        return model | ({"experts_implementation": experts} if experts else {})


def with_task(source: Source, word: str) -> Source:
    """Return the source with the task of a suite or experiment, and its limits of answers, or with that of words.

    Raises InvalidValueError for a suite whose arms have several tasks, and for words without a name.
    """
    if is_spec(word):
        experiment, *others = (run.experiment for run in runs_of(Path(word), []))
        if any(other.task != experiment.task for other in others):
            cure = "name one by words: --task 'name=gsm8k path=FILE'"
            raise InvalidValueError(f"--task {word}: its arms have several tasks; {cure}")
        limits = experiment.evaluation.model_dump(include={"max_new_tokens", "stop"})
        judged = {**(source.own.get("evaluation") or {}), **limits}
        task = experiment.task.model_dump(mode="json")
        return replace(source, own={**source.own, "task": task, "evaluation": judged})
    content: dict[str, Any] = {}
    for key_value in words_in(word):
        content = merge(content, change_of(f"task.{key_value}"))
    if "name" not in content["task"]:
        raise InvalidValueError(f"--task {shown(word)}: say which task: name=gsm8k; {', '.join(TASKS)} are known")
    return replace(source, own={**source.own, "task": content["task"]})


def source_of(what: Path, runs: Path) -> Source:
    """Return what a model folder, a run or a checkpoint of a run stands for; a run's `final` means the run.

    Raises NotFoundError for none of them, CheckFailed for a run that failed, InvalidValueError for one without policy.
    """
    run = what.parent.parent
    if what.parent.name == "checkpoints" and (run / "spec.yaml").is_file():
        if not any(what.glob("*.safetensors")):
            raise InvalidValueError(
                f"{what}: holds no whole weights (of FSDP each process keeps its part); name `final`"
            )
        return Source(what, _own(RunFolder(run)), f"{RunFolder(run).key} {what.name}")
    if what.is_dir() and what.name != "final" and not (what / "result.json").is_file():
        if (what / "spec.yaml").is_file():
            raise InvalidValueError(
                f"{what} is not finished; name one of its checkpoints: {what}/checkpoints/checkpoint-N"
            )
        return Source(what)
    try:
        made_by = run_meant(str(what), runs)
    except NotFoundError:
        return Source(what)  # the check of paths says what is missing, and the cure
    if made_by is None:
        return Source(what)
    folder = RunFolder(made_by)
    if not (folder.path / "final").is_dir():
        raise InvalidValueError(f"{folder.key} keeps no policy (there is no folder final); name one of its checkpoints")
    return Source(folder.path / "final", _own(folder), folder.key)


def _own(folder: RunFolder) -> Mapping[str, Any]:
    return dict(with_present_names(folder.spec()))


def described(
    source: Source,
    dtype: str | None,
    task: dict[str, str],
    precision: Sequence[str],
    sweep: bool,
    given: dict[str, Any],
    injections: Sequence[str] = (),
) -> Experiment:
    """Return the experiment to evaluate; its errors are found before torch is imported.

    Of a run it has the task, the limits, the injection and the profiles, but for what is `given`.
    """
    own, model = source.own, source.model(dtype)
    judged = dict(own.get("evaluation") or {}) | {"matmul_noise": (), "formats": ()}
    if precision or injections or "profiles" not in judged:
        named = asked_profiles(precision or judged.get("profiles", ["full"]), injections)
        named = with_stored(named, model, given.get("deployment"))
        judged |= named | {"injections": {**judged.get("injections", {}), **named["injections"]}}
    if not source.name and "deployment" in judged["profiles"]:
        raise InvalidValueError("--precision deployment: is a run's own injection; name a mode such as w4a8, or a run")
    if sweep:
        judged |= _SWEEP
    if sweep and model["dtype"] == "bfloat16":  # its weights are BF16 already: that point of the sweep is `full`
        judged["formats"] = tuple(name for name in _SWEEP["formats"] if name != "bf16")
        judged["profiles"] = list(dict.fromkeys(["full", *judged["profiles"]]))
    tokens = TASKS[task["name"]].answer_tokens if task.get("name") in TASKS else None
    if tokens is not None and task.get("name") != (own.get("task") or {}).get("name"):
        judged["max_new_tokens"] = tokens
    judged["kl"] = True
    judged |= {key: value for key, value in given.items() if value is not None}
    content = {"model": model, "task": task, "evaluation": judged, "injection": own.get("injection")}
    return parse(Experiment, content, "")


def asked_task(
    own: Mapping[str, Any],
    task: str | None,
    files: Mapping[str, Path | None],
    split: str | None,
    few_shot: int | None = None,
) -> dict[str, Any]:
    """Return the key `task` of an experiment for `--task`, `files` (`--data`, `--test-path`), `--split`, `--few-shot`.

    A run's `own` task is kept where no other is named. Raises InvalidValueError for a task without its file, for a file
    with a task that reads none, and for a test file that would be cut by mistake.
    """
    data, test_path = files.get("data"), files.get("test_path")
    name = task or own.get("name") or "arithmetic"
    kept = dict(own) if name == own.get("name") else {}
    if test_path is not None and (split is not None or (data is not None and not few_shot)):
        raise InvalidValueError(
            "--test-path FILE is held out whole; drop --data and --split, which cut a training file"
        )
    if few_shot and test_path is not None and data is None:
        raise InvalidValueError("--few-shot: the solved problems come from --data FILE; name a training file too")
    if data is not None and split is None and test_path is None and "test" in data.stem.lower():
        raise InvalidValueError(
            f"--data {data}: by its name a test file, of which only a tenth would be answered; --test-path {data} "
            "answers all of it, --split test that tenth"
        )
    if name not in TASKS:
        raise InvalidValueError(f"--task {shown(name)}: no such task{nearest(name, TASKS)}")
    file, keys = data or test_path, TASKS[name].file_keys()
    if file is not None and not keys:
        others = " or ".join(f"--task {each}" for each, other in TASKS.items() if other.file_keys())
        raise InvalidValueError(f"--data {file}: the {name} task makes its own problems; add {others}")
    if file is None and keys and not kept and TASKS[name].model_fields[keys[0]].is_required():
        raise InvalidValueError(f"--task {name} needs --data FILE: {TASKS[name].model_fields[keys[0]].description}")
    if few_shot and "few_shot" not in TASKS[name].model_fields:
        raise InvalidValueError(f"--few-shot: the {name} task has no key few_shot; its problems stand alone")
    replaced = {key: None for key in keys if file is not None and key in kept} | ({keys[0]: str(file)} if file else {})
    shots = {} if few_shot is None else {"few_shot": few_shot}
    return {"name": name} | kept | replaced | ({"test_path": str(test_path)} if test_path else {}) | shots


def cut_from(source: Source, data: Path | None, test_path: Path | None, split: str) -> str | None:
    """Return where the problems come from, in words."""
    if test_path is not None:
        return f"problems: {test_path}, held out whole"
    if data is not None:
        return f"problems: the {split} split, the tenth of {data} that its questions' hash picks"
    if source.own:
        whose = f"problems and limits: those of {source.name}, its" if source.name else "problems: the task's"
        return f"{whose} {split} split"
    return None
