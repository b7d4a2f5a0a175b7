"""`fp4rl audit`: what reported experiments allow to be said."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp4rl.cli.options import AsJson
from fp4rl.cli.terminal import console, print_json, styled
from fp4rl.lab.audit.confounds import ONE_RUN
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from fp4rl.lab.audit.audit import Audit, AuditedPair


def command(
    file: Annotated[Path, typer.Argument(help="JSON with 'records' and 'gsm8k_test_n'.")],
    brief: Annotated[bool, typer.Option("--brief", help="Leave out the list of all records.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give published comparisons their intervals and confounds, and name treatments that never happened.

    Example: `fp4rl audit reported_experiments.json`
    """
    from fp4rl.lab.audit.audit import audit
    from fp4rl.lab.audit.records import read_reports

    found = audit(read_reports(file))
    if as_json:
        print_json(found.as_dict())
        return
    _print_pairs(found)
    _print_silent(found)
    if not brief:
        _print_records(found)


def _print_pairs(found: "Audit") -> None:
    screen = console()
    confounds = {one.record.id: one.confounds for one in found.records}
    pairs, problems = counted(len(found.pairs), "comparison"), counted(found.problems, "problem")
    heading = f"{pairs} in points, 95 % intervals over {problems} (Newcombe)"
    screen.print(styled((heading, "bold")), highlight=False)
    screen.print("Each arm is one run: no comparison earns an effect word.", highlight=False)
    if found.spread:
        groups, sd, band = found.spread.groups, found.spread.sd, found.spread.band((1, 1))
        repeats = f"Runs that turned out to be repeats ({counted(groups, 'group')})"
        line = f"{repeats} have a standard deviation of {sd:.2f} points:"
        screen.print(f"{line} 95 % of pairs of equal runs differ by less than {band:.1f} points.", highlight=False)
    for one in found.pairs:
        share, pair = one.difference, one.pair
        accuracies = f"{pair.treatment.final_accuracy:.2f} against {pair.control.final_accuracy:.2f}"
        interval = f"{100 * share.value:+.1f} [{100 * share.low:+.1f}, {100 * share.high:+.1f}]"
        screen.print(f"\n{pair.treatment.id} against {pair.control.id} ({pair.factor}): {accuracies}", highlight=False)
        _indented(f"{interval}, {_p(share.p)}, after Holm {_p(one.p_family)}")
        both = dict.fromkeys((*confounds[pair.treatment.id], *confounds[pair.control.id]))
        _indented("; ".join([*_remarks(one), *(text for text in both if text != ONE_RUN)]))


def _remarks(one: "AuditedPair") -> list[str]:
    """What the comparison really compares."""
    remarks = ["the same treatment twice: its noise was never effective"] if one.replicates else []
    if not one.replicates and one.pair.factor == "noise" and one.noise.state != "effective":
        remarks.append(f"noise: {one.noise.state}")
    if one.inside_band:
        remarks.append("no larger than equal runs differ")
    return [*remarks, *one.pair.differs]


def _print_silent(found: "Audit") -> None:
    reasons: dict[str, list[str]] = {}
    for one in found.records:
        if one.noise.state == "never effective":
            reasons.setdefault("; ".join(one.noise.reasons), []).append(one.record.id)
    count = sum(len(ids) for ids in reasons.values())
    console().print(styled((f"\n{counted(count, 'arm')} whose noise was never effective", "bold")), highlight=False)
    for reason, ids in reasons.items():
        console().print(", ".join(ids), highlight=False)
        _indented(reason)


def _print_records(found: "Audit") -> None:
    console().print(styled((f"\n{len(found.records)} records", "bold")), highlight=False)
    for one in found.records:
        final = "no result" if one.record.final_accuracy is None else f"{one.record.final_accuracy:.2f} %"
        console().print(f"{one.record.id}: {final}; noise: {one.noise.state}", highlight=False)
        news = one.noise.reasons if one.noise.state == "not as named" else ()
        _indented("; ".join((*news, *one.confounds)))


def _indented(text: str) -> None:
    from rich.padding import Padding
    from rich.text import Text

    if text:
        console().print(Padding(Text(text), (0, 0, 0, 4)))


def _p(value: float) -> str:
    return "p < 1e-9" if value < 1e-9 else f"p = {value:.2g}"
