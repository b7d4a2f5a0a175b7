"""What `fp4rl eval` shows: shares with intervals, of several samples too, paired differences, and notes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fp4rl.cli.packed_start import STORED
from fp4rl.cli.show import KL, in_nats
from fp4rl.cli.terminal import table
from fp4rl.lab.files import whole
from fp4rl.lab.serving import changed, packed_otherwise
from fp4rl.spec.evidence import Evaluation
from fp4rl.spec.shared_scales import batch_note

if TYPE_CHECKING:
    from fp4rl.lab.statistics.proportions import ShareDifference
    from fp4rl.rl.answered import Evaluation as Measured
    from fp4rl.rl.evaluate import EvaluationRunner

# One answer in twenty: that changes the accuracy more than most recipes do.
_MANY_CUT_OFF = 0.05


def notes(runner: "EvaluationRunner", saved: str, *, is_packed: bool = False) -> Iterator[str]:
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


def saved_in(model: Path) -> str | None:
    """Return the dtype that a model folder names; None where it names none."""
    file = model / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config.get("dtype") or config.get("torch_dtype")


def shares_table(title: str, summaries: Sequence[Evaluation], problems: str | None = None) -> Table:
    """Return a table with a line for each precision."""
    rows, measured = [], any(s.kl is not None for s in summaries)
    for s in summaries:
        strict = _with_interval(s.strict, s)
        shares = (s.flexible, s.formatted, s.truncated)
        cells = [s.profile.name, str(_problems(s)), strict, *(f"{100 * (share or 0.0):.1f}" for share in shares)]
        rows.append([*cells, f"{s.mean_length or 0.0:.1f}", *([in_nats(s.kl)] if measured else [])])
    names = ("n", "strict", "flexible", "format", "cut", "tokens", *(("KL",) if measured else ()))
    numbers = (f"{name}>" for name in names)
    caption = "\n".join([*_caption(summaries), *([problems] if problems else [])])
    return table("precision=", *numbers, rows=rows, title=f"{title}: shares in %", caption=caption)


def samples_table(summaries: Sequence[Evaluation]) -> Table | None:
    """Return a table of pass@k and maj@k; None with one answer a problem. pass@1 is the column `strict`."""
    names = dict.fromkeys(name for s in summaries for name in _of_samples(s) if name != "pass@1")
    if not names:
        return None
    rows = [
        (s.profile.name, name, _with_interval(s.of_samples[name], s))
        for s in summaries
        for name in names
        if name in s.of_samples
    ]
    return table("precision=", "of k", "%>", rows=rows, title="several answers to a problem", caption=_OF_K)


_OF_K = (
    "pass@k: one of k is right; maj@k: the most frequent of k is right. Both are means over all ways to draw k of the "
    "answers; 95 % Wilson intervals with n problems as trials"
)


def intervals(summary: Evaluation) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval over problems of each share of right answers."""
    from fp4rl.lab.statistics.proportions import wilson

    shares = {"strict": summary.strict, **{name: summary.of_samples[name] for name in _of_samples(summary)}}
    n = _problems(summary)
    return {name: wilson(share * n, n) for name, share in shares.items()}


def differences(evaluations: "Sequence[Measured]") -> "dict[str, tuple[ShareDifference, int, int]]":
    """Return, for each precision but the first, its difference to the first on the same problems, and the numbers of
    problems that it gains and loses."""
    from fp4rl.lab.statistics.paired import paired

    def shares(evaluation: "Measured") -> list[float]:
        return [sum(item.strict for item in items) / len(items) for items in evaluation.by_problem().values()]

    against = {}
    first = shares(evaluations[0])
    for evaluation in evaluations[1:]:
        own = shares(evaluation)
        gained = sum(a > b for a, b in zip(own, first, strict=True))
        lost = sum(a < b for a, b in zip(own, first, strict=True))
        against[evaluation.profile.name] = paired(own, first), gained, lost
    return against


def differences_table(first: str, against: "Mapping[str, tuple[ShareDifference, int, int]]") -> Table:
    """Return a table of differences to the `first` precision."""
    rows = [
        (name, f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]", str(gained), str(lost), f"{d.p:.2g}")
        for name, (d, gained, lost) in against.items()
    ]
    caption = (
        "of this checkpoint on these problems, paired (Tango's score interval; with several answers t over problems); "
        "whether recipes differ needs seeds (`fp4rl compare`)"
    )
    title = f"difference to {first}, points [95 % over problems]"
    return table("precision=", "strict>", "gained>", "lost>", "p>", rows=rows, title=title, caption=caption)


def as_rows(evaluations: "Sequence[Measured]") -> list[dict[str, Any]]:
    """Return what the tables show, an entry for each precision."""
    against, rows = differences(evaluations), []
    for evaluation in evaluations:
        summary = evaluation.summary()
        row = summary.as_json() | {"intervals": intervals(summary)}
        if (paired := against.get(summary.profile.name)) is not None:
            difference, gained, lost = paired
            beside = {"to": evaluations[0].profile.name, "gained": gained, "lost": lost}
            row["difference"] = asdict(difference) | beside
        rows.append(row)
    return rows


def write_items(out: Path, evaluations: "Sequence[Measured]") -> None:
    """Write one row per problem and sample: JSON lines for a name that ends so, else Parquet."""
    rows = [{"profile": e.profile.name, **asdict(item)} for e in evaluations for item in e.items]
    with whole(out) as partial:
        if out.suffix in (".jsonl", ".json"):
            partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            return
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), partial)


def _of_samples(summary: Evaluation) -> list[str]:
    return [name for name in summary.of_samples if name.startswith(("pass@", "maj@"))]


def _with_interval(share: float, summary: Evaluation) -> str:
    from fp4rl.lab.statistics.proportions import wilson

    n = _problems(summary)  # several answers to one problem are not independent trials
    low, high = wilson(share * n, n)
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _caption(summaries: Sequence[Evaluation]) -> Iterator[str]:
    """Yield notes: what n counts, what the intervals are over, answers cut off, and what acted under other names."""
    answers = max((s.n or 0) // _problems(s) for s in summaries)
    if answers == 1:
        yield "n problems, one answer each; 95 % Wilson intervals over problems"
    else:
        yield f"n problems, {answers} answers each; strict, flexible and format are means over all answers."
        yield "95 % Wilson intervals with n problems as trials: answers to one problem are not independent"
    yield f"cut: the share that the token limit, {summaries[0].profile.max_new_tokens}, cut off"
    if any(s.kl is not None for s in summaries):
        tops = ", ".join(f"{s.profile.name} {100 * s.same_top:.1f} %" for s in summaries if s.same_top is not None)
        yield f"{KL}; the likeliest next token is the same at {tops} of them"
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
