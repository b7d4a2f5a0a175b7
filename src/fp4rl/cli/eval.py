"""`fp4rl eval`: evaluate a Hugging Face model folder on a task, at a named precision."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4rl.cli.options import AsJson, require_writable
from fp4rl.cli.terminal import console, print_json, progress, ready_to_round, table
from fp4rl.spec.errors import InvalidValueError, shown
from fp4rl.spec.evaluation import MATMUL_NOISE
from fp4rl.spec.load import read_yaml
from fp4rl.spec.plain_yaml import plain_values

if TYPE_CHECKING:
    from rich.table import Table

    from fp4rl.rl.evaluate import Evaluation as Measured
    from fp4rl.rl.evaluate import EvaluationRunner
    from fp4rl.spec.evidence import Evaluation
    from fp4rl.spec.experiment import Experiment

# One answer in twenty moves the accuracy by more points than most recipes do.
_MANY_CUT_OFF = 0.05
# The robustness of one checkpoint: relative errors in every matmul, and formats of the weights.
_SWEEP = {"matmul_noise": (0.0, 0.01, 0.02, 0.05, 0.1), "formats": ("bf16", "mxfp8", "nvfp4", "mxfp4")}


def command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder on this disk.")],
    task: Annotated[
        str, typer.Option(help="arithmetic, gsm8k with --data, or another of `fp4rl keys task.name`.")
    ] = "arithmetic",
    data: Annotated[
        Path | None,
        typer.Option(help="The task's file, such as GSM8K's: a tenth of it is answered, see --split."),
    ] = None,
    test_path: Annotated[
        Path | None, typer.Option(help="A test file in the place of --data: all of it is held out.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="test (the default) or validation: which tenth of --data.")] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            "-p",
            help="full, a mode (w4a16), a format (mxfp8), matmul_noise=0.05, or a YAML file with an injection, also as "
            "NAME=FILE; may repeat.",
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="Deployment preset of the formats.")] = "ocp",
    count: Annotated[int | None, typer.Option(min=1, help="Problems; by default all there are, up to 500.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="By default what the task's answers take (arithmetic 48), else 1024.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends an answer; may repeat, '' is none. The default is the task's own."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="1 is greedy; more are sampled: mean@k, pass@k.")] = 1,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also: matmul noise of 0 to 10 %, and BF16, MXFP8, NVFP4, MXFP4 weights.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="The dtype that the model is loaded in.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write one row per problem to this Parquet file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer the task's test problems greedily and print strict, flexible and format rate with 95 % intervals.

    Example: `fp4rl eval runs/quickstart/RUN/final -p full -p w4a16 -p mxfp8 -p matmul_noise=0.05 --preset vllm`
    """
    _require_new(out)
    given = {"preset": preset, "samples": samples, "split": split, "count": count}
    given |= {"max_new_tokens": max_new_tokens, "stop": [text for text in stop if text] if stop else None}
    start = {"path": str(model), "dtype": dtype}
    described = _described(start, _asked_task(task, data, test_path, split), precision or ["full"], sweep, given)
    runner, evaluations = _evaluated(described, model, count)
    summaries = [evaluation.summary() for evaluation in evaluations]
    if out is not None:
        _write(out, [(e.profile.name, asdict(item)) for e in evaluations for item in e.items])
    if as_json:
        print_json([summary.as_json() for summary in summaries])
    else:
        console().print(_table(str(model), summaries, _cut_from(data, test_path, runner.spec.split)))
        _print_batch_notes(runner)


def _evaluated(described: "Experiment", model: Path, count: int | None) -> "tuple[EvaluationRunner, list[Measured]]":
    """Evaluate the model at every precision, in their order, with a bar on stderr."""
    from fp4rl.cli.described import require_here
    from fp4rl.lab.matrix import single
    from fp4rl.models.quiet import quiet

    require_here([single(described, "eval")])
    quiet()  # torch is imported below: it costs seconds, and every mistake above is answered without it
    from fp4rl.rl.evaluate import EvaluationRunner

    ready_to_round()
    spec = described.evaluation.for_task(described.task)
    problems = described.task.problems(spec.split, count)[: spec.count]
    runner = EvaluationRunner(spec, None, described.task, problems)
    with progress() as advance:
        return runner, list(runner.run(model, described.model.dtype, 0, True, advance))


def _print_batch_notes(runner: "EvaluationRunner") -> None:
    from fp4rl.spec.injection import batch_note

    for name, measured in runner.precisions().items():
        if note := batch_note(measured.injection, "evaluation"):
            console().print(f"{name}: {note} ({runner.spec.batch_size} answers here)")


def _described(
    model: dict[str, str], task: dict[str, str], precision: list[str], sweep: bool, given: dict[str, Any]
) -> "Experiment":
    """The experiment whose evaluation is asked for; mistakes are found before torch is imported."""
    from fp4rl.spec.experiment import Experiment
    from fp4rl.spec.load import parse
    from fp4rl.spec.task_registry import TASKS

    evaluation = asked_profiles(precision)
    if sweep:
        evaluation |= _SWEEP
    if sweep and model["dtype"] == "bfloat16":  # its weights are BF16 as they are: that point of the sweep is `full`
        evaluation["formats"] = tuple(name for name in _SWEEP["formats"] if name != "bf16")
        evaluation["profiles"] = list(dict.fromkeys(["full", *evaluation["profiles"]]))
    described = TASKS.get(task["name"])
    if described is not None and described.answer_tokens is not None:
        evaluation["max_new_tokens"] = described.answer_tokens
    evaluation |= {key: value for key, value in given.items() if value is not None}
    return parse(Experiment, {"model": model, "task": task, "evaluation": evaluation}, "")


def _asked_task(task: str, data: Path | None, test_path: Path | None, split: str | None) -> dict[str, str]:
    """What `--task`, `--data` and `--test-path` say. A test file is not cut by mistake."""
    from fp4rl.cli.described import asked_task

    if test_path is not None:
        if data is not None or split is not None:
            raise InvalidValueError(
                "--test-path FILE is held out whole; drop --data and --split, which cut a training file"
            )
        return {**asked_task(task, test_path), "test_path": str(test_path)}
    if data is not None and split is None and "test" in data.stem.lower():
        raise InvalidValueError(
            f"--data {data}: by its name a test file, of which only a tenth would be answered; --test-path {data} "
            "answers all of it, --split test that tenth"
        )
    return asked_task(task, data)


def _cut_from(data: Path | None, test_path: Path | None, split: str) -> str | None:
    if test_path is not None:
        return f"problems: {test_path}, held out whole"
    return None if data is None else f"problems: the {split} split, the tenth of {data} that its questions' hash picks"


def _table(title: str, summaries: "list[Evaluation]", problems: str | None = None) -> "Table":
    from fp4rl.lab.statistics.proportions import wilson

    # pass@1 is the mean accuracy, which stands under `strict`
    passed = list(
        dict.fromkeys(name for s in summaries for name in s.of_samples if name.startswith("pass@") and name != "pass@1")
    )
    rows = []
    for s in summaries:
        n = _problems(s)  # several answers to one problem are no independent trials
        low, high = wilson(round(s.strict * n), n)
        strict = f"{100 * s.strict:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        shares = (s.flexible, s.formatted, s.truncated)
        cells = [s.profile.name, str(n), strict, *(f"{100 * (share or 0.0):.1f}" for share in shares)]
        rows.append([*cells, f"{s.mean_length or 0.0:.1f}", *(f"{100 * s.of_samples[name]:.1f}" for name in passed)])
    numbers = (f"{name}>" for name in ("n", "strict", "flexible", "format", "cut", "tokens", *passed))
    caption = "\n".join([_caption(summaries), *([problems] if problems else [])])
    return table("precision=", *numbers, rows=rows, title=f"{title}: shares in %", caption=caption)


def _caption(summaries: "list[Evaluation]") -> str:
    """What n counts, what the intervals are of, what was cut off, and what acted under names that do not say it."""
    return "\n".join([_counts(summaries), *_cut_off(summaries), *_labels(summaries)])


def _cut_off(summaries: "list[Evaluation]") -> list[str]:
    """A line where so many answers met the limit that the accuracy is one of the limit too."""
    worst = max(summaries, key=lambda s: s.truncated or 0.0)
    share = worst.truncated or 0.0
    if share <= _MANY_CUT_OFF:
        return []
    return [
        f"{100 * share:.0f} % of the answers of {worst.profile.name} were cut off at the token limit, "
        f"{worst.profile.max_new_tokens}, and scored as they stood: raise --max-new-tokens, or name what ends an "
        "answer with --stop"
    ]


def _labels(summaries: "list[Evaluation]") -> list[str]:
    pairs = [(s.profile.name, s.profile.precision) for s in summaries]
    return [f"{name}: {label}" for name, label in pairs if label is not None and label != name]


def _counts(summaries: "list[Evaluation]") -> str:
    cut = f"cut: the share that the token limit, {summaries[0].profile.max_new_tokens}, cut off"
    answers = max((s.n or 0) // _problems(s) for s in summaries)
    if answers == 1:
        return f"n problems, one answer each; 95 % Wilson intervals over problems\n{cut}"
    return (
        f"n problems, {answers} answers each; strict, flexible and format are means over all answers.\n95 % Wilson "
        f"intervals with n problems as trials: answers to one problem are not independent\n{cut}"
    )


def _problems(evaluation: "Evaluation") -> int:
    return evaluation.problems or evaluation.n or 1


def _require_new(out: Path | None) -> None:
    if out is not None and out.is_file():
        raise InvalidValueError(f"--out {out}: is there already; name another file")
    require_writable(out, "--out")


def _write(out: Path, rows: list[tuple[str, dict[str, object]]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    from fp4rl.lab.files import whole

    with whole(out) as partial:
        parquet.write_table(pa.Table.from_pylist([{"profile": name, **row} for name, row in rows]), partial)


def asked_profiles(words: Sequence[str]) -> dict[str, Any]:
    """The keys `profiles` and `injections` of an evaluation.

    A word is the name of a profile, a YAML file that holds an injection (an experiment, a run's `spec.yaml`, what
    `fp4rl scan --advise` wrote, or an injection alone), or NAME=FILE or NAME={mapping}.
    """
    names, own = [], dict[str, Any]()
    for word in words:
        name, equals, what = word.partition("=")
        if word.startswith(MATMUL_NOISE) or not (equals or _is_file(word)):
            names.append(word)
            continue
        name, what = (name, what) if equals else (_name_of(Path(word)), word)
        if name in own:
            raise InvalidValueError(f"--precision {word}: {name!r} is named twice; write NAME=FILE")
        own[name] = _injection(word, what)
        names.append(name)
    return {"profiles": names, "injections": own}


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _name_of(file: Path) -> str:
    """Every run's description is called spec.yaml, so its folder tells more."""
    return file.resolve().parent.name if file.stem == "spec" else file.stem


def _injection(word: str, what: str) -> Any:
    if not _is_file(what):
        content = plain_values(what, shown(what), "try '{weight: mxfp4, input: mxfp8}'")
        if not isinstance(content, dict):
            raise InvalidValueError(f"--precision {word}: write NAME=FILE.yaml, or NAME={{mapping}} of an injection")
        return content
    content = read_yaml(what)
    if "arms" in content:
        raise InvalidValueError(
            f"--precision {word}: a suite has many injections; name the spec.yaml of one of its runs"
        )
    if content.get("injection", content) is None:
        raise InvalidValueError(f"--precision {word}: {what} injects nothing, which is the profile full")
    return content.get("injection", content)
