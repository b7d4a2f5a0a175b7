"""`fp4rl eval`: judge a Hugging Face model folder on a task, at a named precision."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fp4rl.cli.outputs import require_writable
from fp4rl.cli.terminal import console, print_json, progress
from fp4rl.spec.mistakes import BadValue

# The robustness of one checkpoint: relative errors in every matmul, and formats of the weights.
_SWEEP = {"matmul_noise": (0.0, 0.01, 0.02, 0.05, 0.1), "formats": ("bf16", "mxfp8", "nvfp4", "mxfp4")}


def command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder on this disk.")],
    task: Annotated[str, typer.Option(help="arithmetic, or gsm8k with --data.")] = "arithmetic",
    data: Annotated[Path | None, typer.Option(help="GSM8K's JSONL or Parquet file.")] = None,
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
    count: Annotated[int, typer.Option(min=1, help="Problems of the test split.")] = 500,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    samples: Annotated[int, typer.Option(min=1, help="1 is greedy; more are sampled: mean@k, pass@k.")] = 1,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also: matmul noise of 0 to 10 %, and BF16, MXFP8, NVFP4, MXFP4 weights.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="The dtype that the model is loaded in.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write one row per problem to this Parquet file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summaries as JSON.")] = False,
) -> None:
    """Answer the task's test problems greedily and print strict, flexible and format rate with 95 % intervals.

    Example: `fp4rl eval runs/quickstart/RUN/final -p full -p w4a16 -p mxfp8 -p matmul_noise=0.05 --preset vllm`
    """
    from fp4rl.cli.asked_profiles import asked_profiles
    from fp4rl.cli.described import asked_task, require_here
    from fp4rl.lab.matrix import single
    from fp4rl.spec.door import parse
    from fp4rl.spec.evaluation import Evaluation
    from fp4rl.spec.experiment import Experiment
    from fp4rl.spec.shared_scales import batch_note

    _require_new(out)
    described = parse(
        Experiment,
        {
            "model": {"path": str(model), "dtype": dtype},
            "task": asked_task(task, data),
            "evaluation": {
                **asked_profiles(precision or ["full"]),
                "preset": preset,
                "count": count,
                "max_new_tokens": max_new_tokens,
                "samples": samples,
                **(_SWEEP if sweep else {}),
            },
        },
        "",
    )
    require_here([single(described, "eval")])
    from fp4rl.models.quiet import quiet

    quiet()  # torch is imported below: it costs seconds, and every mistake above is answered without it
    from fp4rl.cli.rounding import ready_to_round
    from fp4rl.rl.judge import Judge
    from fp4rl.rl.start import task_of

    ready_to_round()
    found_task = task_of(described.task)
    spec: Evaluation = described.evaluation
    judge = Judge(spec, None, found_task, found_task.problems(spec.split, spec.count))
    names = judge.precisions()
    with progress(console(stderr=True)) as bar:
        places = {name: bar.add_task(name, total=count) for name in names}
        found = list(judge.judge(model, dtype, 0, True, lambda name, done, _: bar.update(places[name], completed=done)))
    if out is not None:
        _write(out, [(e.profile.name, asdict(item)) for e in found for item in e.items])
    if as_json:
        print_json([e.summary() for e in found])
        return
    console().print(_table(str(model), [e.summary() for e in found]))
    for name, measured in names.items():
        if note := batch_note(measured.injection, "evaluation"):
            console().print(f"{name}: {note} ({judge.decoding.batch_size} answers here)", highlight=False)


def _table(title: str, summaries: list[dict[str, Any]]) -> Table:
    from fp4rl.lab.statistics.proportions import wilson

    table = Table(
        title=f"{title}: shares in %",
        title_justify="left",
        caption=_caption(summaries),
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.caption_justify = "left"
    passed = list(dict.fromkeys(name for s in summaries for name in s if name.startswith("pass@")))
    for name in ("precision", "n", "strict", "flexible", "format", "tokens", *passed):
        table.add_column(name, justify="left" if name == "precision" else "right", no_wrap=True)
    for s in summaries:
        n = int(str(s.get("problems", s["n"])))  # several answers to one problem are no independent trials
        cells = [str(s["profile"]["name"]), str(n)]
        for key in ("strict", "flexible", "formatted"):
            share = float(str(s[key]))
            low, high = wilson(round(share * n), n)
            cells.append(f"{100 * share:.1f}" + (f" [{100 * low:.1f}, {100 * high:.1f}]" if key == "strict" else ""))
        table.add_row(
            *cells, f"{float(str(s['mean_length'])):.1f}", *(f"{100 * float(str(s[name])):.1f}" for name in passed)
        )
    return table


def _caption(summaries: list[dict[str, Any]]) -> str:
    """What n counts, what the intervals are of, and what acted under names that do not say it."""
    return "\n".join([_counts(summaries), *_labels(summaries)])


def _labels(summaries: list[dict[str, Any]]) -> list[str]:
    pairs = [(s["profile"]["name"], s["profile"].get("precision")) for s in summaries]
    return [f"{name}: {label}" for name, label in pairs if label is not None and label != name]


def _counts(summaries: list[dict[str, Any]]) -> str:
    answers = max(int(str(s["n"])) // int(str(s.get("problems", s["n"]))) for s in summaries)
    if answers == 1:
        return "n problems, one answer each; 95 % Wilson intervals over problems"
    return (
        f"n problems, {answers} answers each; strict, flexible and format are means over all answers.\n95 % Wilson "
        "intervals with n problems as trials: answers to one problem are not independent"
    )


def _require_new(out: Path | None) -> None:
    if out is not None and out.is_file():
        raise BadValue(f"--out {out}: is there already; name another file")
    require_writable(out, "--out")


def _write(out: Path, rows: list[tuple[str, dict[str, object]]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    partial = out.with_name(f".{out.name}.partial")
    parquet.write_table(pa.Table.from_pylist([{"profile": name, **row} for name, row in rows]), partial)
    partial.rename(out)
