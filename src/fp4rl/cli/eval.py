"""`fp4rl eval`: evaluate a Hugging Face model folder on a task, at a named precision."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fp4rl.cli.described import require_here
from fp4rl.cli.options import AsJson, Deployed, FormerPreset, asked_deployment, require_writable
from fp4rl.cli.packed_start import STORED, say_packed, with_stored
from fp4rl.cli.terminal import console, print_json, progress, ready_to_round, say_once, table
from fp4rl.lab.files import whole
from fp4rl.lab.matrix import single
from fp4rl.lab.serving import changed, packed_otherwise
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import InvalidValueError, nearest, shown
from fp4rl.spec.evaluation import MATMUL_NOISE
from fp4rl.spec.evidence import Evaluation
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.former_names import renamings
from fp4rl.spec.injection import batch_note
from fp4rl.spec.load import parse, read_yaml
from fp4rl.spec.plain_yaml import plain_values
from fp4rl.spec.task_registry import TASKS

if TYPE_CHECKING:
    from fp4rl.rl.evaluate import Evaluation as Measured
    from fp4rl.rl.evaluate import EvaluationRunner

# One answer in twenty: that changes the accuracy more than most recipes do.
_MANY_CUT_OFF = 0.05
# The robustness sweep of a checkpoint: relative errors in every matmul, and formats of the weights.
_SWEEP = {"matmul_noise": (0.0, 0.01, 0.02, 0.05, 0.1), "formats": ("bf16", "mxfp8", "nvfp4", "mxfp4")}

Precisions = Annotated[
    list[str] | None,
    typer.Option(
        "--precision",
        "-p",
        help="full, a mode (w4a8), a format (mxfp8), matmul_noise=0.05, stored (a packed folder as it is served), or a "
        "YAML file with an injection, also as NAME=FILE; may be repeated.",
    ),
]


def command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder on this disk.")],
    task: Annotated[
        str, typer.Option(help="arithmetic, gsm8k with --data, or another that `fp4rl keys task.name` lists.")
    ] = "arithmetic",
    data: Annotated[
        Path | None,
        typer.Option(help="The task's file, such as GSM8K's; a tenth of it is held out and answered, see --split."),
    ] = None,
    test_path: Annotated[
        Path | None, typer.Option(help="A test file instead of --data; all of it is answered.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="test (the default) or validation: which tenth of --data.")] = None,
    precision: Precisions = None,
    deployment: Deployed = None,
    count: Annotated[int | None, typer.Option(min=1, help="Number of problems; by default all, up to 500.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of an answer; by default the task's own (arithmetic: 48), else 1024."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends an answer; may be repeated, '' for none. The default is the task's own."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers a problem: 1 is greedy, more are sampled.")] = 1,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Add matmul noise of 0 to 10 %, and BF16, MXFP8, NVFP4 and MXFP4 weights.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="The dtype that the model is loaded in.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write one row per problem to this Parquet file.")] = None,
    preset: FormerPreset = None,
    as_json: AsJson = False,
) -> None:
    """Answer the task's test problems and print strict, flexible and format rates with 95 % intervals.

    Example: `fp4rl eval runs/quickstart/RUN/final -p full -p w4a8 -p matmul_noise=0.05 --deployment vllm_ascend`
    """
    require_writable(out, "--out", new=True)
    given: dict[str, Any] = {
        "deployment": asked_deployment(deployment, preset),
        "samples": samples,
        "split": split,
        "count": count,
    }
    given |= {"max_new_tokens": max_new_tokens, "stop": [text for text in stop if text] if stop else None}
    start = {"path": str(model), "dtype": dtype}
    described = _described(start, _asked_task(task, data, test_path, split), precision or ["full"], sweep, given)
    runner, evaluations = _evaluated(described, model, count)
    summaries = [evaluation.summary() for evaluation in evaluations]
    if out is not None:
        _write(out, evaluations)
    if as_json:
        print_json([summary.as_json() for summary in summaries])
        return
    console().print(_table(str(model), summaries, _cut_from(data, test_path, runner.spec.split)))
    for line in _notes(runner, _saved_in(model) or "bfloat16", is_packed=say_packed(model)):
        console().print(line)


def _notes(runner: "EvaluationRunner", saved: str, *, is_packed: bool = False) -> Iterator[str]:
    """Yield what the table does not show, once for all precisions: what is served or packed otherwise, for example."""
    precisions: dict[str, list[str]] = {}
    for name, measured in runner.precisions().items():
        batch = batch_note(measured.injection, "evaluation")
        packed = None if is_packed else packed_otherwise([measured.injection], saved)
        again = is_packed and measured.injection is not None and measured.injection.weight is not None
        for line in (
            f"{batch} ({runner.spec.batch_size} answers here)" if batch else None,
            changed(measured.injection),
            f"{packed}; -p FILE with `dtype` of an injection rounds them in another" if packed else None,
            f"rounds the stored weights once more; -p {STORED} takes them as they are" if again else None,
        ):
            if line is not None:
                precisions.setdefault(line, []).append(name)
    yield from (f"{', '.join(names)}: {line}" for line, names in precisions.items())


def _saved_in(model: Path) -> str | None:
    """Return the dtype that a model folder names; None where it names none."""
    file = model / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config.get("dtype") or config.get("torch_dtype")


def _evaluated(described: Experiment, model: Path, count: int | None) -> "tuple[EvaluationRunner, list[Measured]]":
    """Evaluate the model at every precision, in order, with a progress bar on stderr."""
    require_here([single(described, "eval")])
    quiet()  # torch, which takes seconds to import, is imported below: all errors above are found without it
    from fp4rl.rl.evaluate import EvaluationRunner

    say_packed(model)
    ready_to_round()
    spec = described.evaluation.for_task(described.task)
    problems = described.task.problems(spec.split, count)[: spec.count]
    runner = EvaluationRunner(spec, None, described.task, problems)
    with progress() as advance:
        return runner, list(runner.run(model, described.model.dtype, 0, True, advance))


def _described(
    model: dict[str, str], task: dict[str, str], precision: list[str], sweep: bool, given: dict[str, Any]
) -> Experiment:
    """Return the experiment to evaluate; its errors are found before torch is imported."""
    evaluation = with_stored(asked_profiles(precision), model, given.get("deployment"))
    if sweep:
        evaluation |= _SWEEP
    if sweep and model["dtype"] == "bfloat16":  # its weights are BF16 already: that point of the sweep is `full`
        evaluation["formats"] = tuple(name for name in _SWEEP["formats"] if name != "bf16")
        evaluation["profiles"] = list(dict.fromkeys(["full", *evaluation["profiles"]]))
    described = TASKS.get(task["name"])
    if described is not None and described.answer_tokens is not None:
        evaluation["max_new_tokens"] = described.answer_tokens
    evaluation |= {key: value for key, value in given.items() if value is not None}
    return parse(Experiment, {"model": model, "task": task, "evaluation": evaluation}, "")


def _asked_task(task: str, data: Path | None, test_path: Path | None, split: str | None) -> dict[str, str]:
    """Return the key `task` of an experiment for `--task`, `--data`, `--test-path` and `--split`.

    Raises InvalidValueError for a task without its file, for a file with a task that reads none, and for a test file
    that would be cut by mistake.
    """
    if test_path is not None and (data is not None or split is not None):
        raise InvalidValueError(
            "--test-path FILE is held out whole; drop --data and --split, which cut a training file"
        )
    if data is not None and split is None and "test" in data.stem.lower():
        raise InvalidValueError(
            f"--data {data}: by its name a test file, of which only a tenth would be answered; --test-path {data} "
            "answers all of it, --split test that tenth"
        )
    if task not in TASKS:
        raise InvalidValueError(f"--task {shown(task)}: no such task{nearest(task, TASKS)}")
    file, keys = data or test_path, TASKS[task].file_keys()
    if file is not None and not keys:
        others = " or ".join(f"--task {name}" for name, other in TASKS.items() if other.file_keys())
        raise InvalidValueError(f"--data {file}: the {task} task makes its own problems; add {others}")
    if file is None and keys and TASKS[task].model_fields[keys[0]].is_required():
        raise InvalidValueError(f"--task {task} needs --data FILE: {TASKS[task].model_fields[keys[0]].description}")
    own_file = {keys[0]: str(file)} if file else {}
    return {"name": task, **own_file} | ({"test_path": str(test_path)} if test_path else {})


def _cut_from(data: Path | None, test_path: Path | None, split: str) -> str | None:
    if test_path is not None:
        return f"problems: {test_path}, held out whole"
    return None if data is None else f"problems: the {split} split, the tenth of {data} that its questions' hash picks"


def _table(title: str, summaries: list[Evaluation], problems: str | None = None) -> Table:
    from fp4rl.lab.statistics.proportions import wilson

    # pass@1 is the mean accuracy, which is the column `strict`
    names = dict.fromkeys(name for s in summaries for name in s.of_samples)
    passed = [name for name in names if name.startswith("pass@") and name != "pass@1"]
    rows = []
    for s in summaries:
        n = _problems(s)  # several answers to one problem are not independent trials
        low, high = wilson(round(s.strict * n), n)
        strict = f"{100 * s.strict:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        shares = (s.flexible, s.formatted, s.truncated)
        cells = [s.profile.name, str(n), strict, *(f"{100 * (share or 0.0):.1f}" for share in shares)]
        rows.append([*cells, f"{s.mean_length or 0.0:.1f}", *(f"{100 * s.of_samples[name]:.1f}" for name in passed)])
    numbers = (f"{name}>" for name in ("n", "strict", "flexible", "format", "cut", "tokens", *passed))
    caption = "\n".join([*_caption(summaries), *([problems] if problems else [])])
    return table("precision=", *numbers, rows=rows, title=f"{title}: shares in %", caption=caption)


def _caption(summaries: list[Evaluation]) -> Iterator[str]:
    """Yield notes: what n counts, what the intervals are over, answers cut off, and what acted under other names."""
    answers = max((s.n or 0) // _problems(s) for s in summaries)
    if answers == 1:
        yield "n problems, one answer each; 95 % Wilson intervals over problems"
    else:
        yield f"n problems, {answers} answers each; strict, flexible and format are means over all answers."
        yield "95 % Wilson intervals with n problems as trials: answers to one problem are not independent"
    yield f"cut: the share that the token limit, {summaries[0].profile.max_new_tokens}, cut off"
    worst = max(summaries, key=lambda s: s.truncated or 0.0)
    if (worst.truncated or 0.0) > _MANY_CUT_OFF:  # the accuracy then depends on the limit
        yield (
            f"{100 * (worst.truncated or 0.0):.0f} % of the answers of {worst.profile.name} were cut off at the token "
            f"limit, {worst.profile.max_new_tokens}, and scored as they stood: raise --max-new-tokens, or name what "
            "ends an answer with --stop"
        )
    for s in summaries:
        imitated = f"imitates {s.profile.deployment}" if s.profile.deployment else None
        known = s.profile.precision in (s.profile.name, None) or s.profile.name == STORED  # it rounds inputs alone
        said = [None if known else s.profile.precision, imitated]
        if any(said):
            yield f"{s.profile.name}: {', '.join(filter(None, said))}"


def _problems(evaluation: Evaluation) -> int:
    return evaluation.problems or evaluation.n or 1


def _write(out: Path, evaluations: "list[Measured]") -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"profile": e.profile.name, **asdict(item)} for e in evaluations for item in e.items]
    with whole(out) as partial:
        parquet.write_table(pa.Table.from_pylist(rows), partial)


def asked_profiles(words: Sequence[str]) -> dict[str, Any]:
    """Return the keys `profiles` and `injections` of an evaluation.

    A word is the name of a profile, a YAML file with an injection (an experiment, a run's `spec.yaml`, a file of
    `fp4rl scan --advise`, or an injection alone), or NAME=FILE or NAME={mapping}.
    """
    names, own = [], dict[str, Any]()
    for word in words:
        name, equals, what = word.partition("=")
        if word.startswith(MATMUL_NOISE) or not (equals or _is_file(word)):
            names.append(word)
            continue
        if not equals:  # the description of every run is called spec.yaml, so the name of its folder is taken
            file = Path(word)
            name, what = file.resolve().parent.name if file.stem == "spec" else file.stem, word
        if name in own:
            raise InvalidValueError(f"--precision {word}: {name!r} is named twice; write NAME=FILE")
        own[name] = _injection(word, what)
        names.append(name)
    return {"profiles": names, "injections": own}


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _injection(word: str, what: str) -> Any:
    if not _is_file(what):
        content = plain_values(what, shown(what), "try '{weight: mxfp4, input: mxfp8}'")
        if not isinstance(content, dict):
            raise InvalidValueError(f"--precision {word}: write NAME=FILE.yaml, or NAME={{mapping}} of an injection")
        return content
    content = read_yaml(what)
    say_once(renamings(content), f"{what}: ")
    if "arms" in content:
        cure = "name the spec.yaml of one of its runs"
        raise InvalidValueError(f"--precision {word}: a suite has many injections; {cure}")
    injection = content.get("injection", content)
    if injection is None:
        raise InvalidValueError(f"--precision {word}: {what} injects nothing, which is the profile full")
    return injection
