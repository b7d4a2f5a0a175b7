"""`fp4rl audit`: intervals and confounds of published results."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp4rl.cli.options import AsJson
from fp4rl.cli.terminal import console, print_indented, print_json, styled
from fp4rl.lab.audit.confounds import ONE_RUN
from fp4rl.lab.audit.records import read_reports
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from fp4rl.lab.audit.audit import Audit, AuditedPair


def command(
    file: Annotated[Path, typer.Argument(help="JSON with 'records' and 'gsm8k_test_n'.")],
    brief: Annotated[bool, typer.Option("--brief", help="Leave out the list of all records.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print intervals and confounds of published comparisons, and name treatments that never acted.

    Example: `fp4rl audit reported_experiments.json`
    """
    from fp4rl.lab.audit.audit import audit

    result = audit(read_reports(file))
    if as_json:
        print_json(result.as_dict())
        return
    _print_pairs(result)
    _print_silent(result)
    if not brief:
        _print_records(result)


def _print_pairs(result: "Audit") -> None:
    screen = console()
    confounds = {audited.record.id: audited.confounds for audited in result.records}
    pairs, problems = counted(len(result.pairs), "comparison"), counted(result.problems, "problem")
    screen.print(styled((f"{pairs} in points, 95 % intervals over {problems} (Newcombe)", "bold")))
    screen.print("Each arm is one run: no comparison earns an effect word.")
    if result.spread:
        groups, sd, band = result.spread.groups, result.spread.sd, result.spread.band((1, 1))
        repeats = f"Runs that turned out to be repeats ({counted(groups, 'group')})"
        line = f"{repeats} have a standard deviation of {sd:.2f} points:"
        screen.print(f"{line} 95 % of pairs of equal runs differ by less than {band:.1f} points.")
    for audited in result.pairs:
        share, pair = audited.difference, audited.pair
        accuracies = f"{pair.treatment.final_accuracy:.2f} against {pair.control.final_accuracy:.2f}"
        interval = f"{100 * share.value:+.1f} [{100 * share.low:+.1f}, {100 * share.high:+.1f}]"
        screen.print(f"\n{pair.treatment.id} against {pair.control.id} ({pair.factor}): {accuracies}")
        print_indented(f"{interval}, {_p(share.p)}, after Holm {_p(audited.p_family)}", by=4)
        both = dict.fromkeys((*confounds[pair.treatment.id], *confounds[pair.control.id]))
        _print_remarks(*_remarks(audited), *(text for text in both if text != ONE_RUN))


def _remarks(audited: "AuditedPair") -> list[str]:
    """Return remarks on what the comparison really compares."""
    remarks = ["the same treatment twice: its noise was never effective"] if audited.replicates else []
    if not audited.replicates and audited.pair.factor == "noise" and audited.noise.state != "effective":
        remarks.append(f"noise: {audited.noise.state}")
    if audited.inside_band:
        remarks.append("no larger than equal runs differ")
    return [*remarks, *audited.pair.differs]


def _print_silent(result: "Audit") -> None:
    ids_by_reason: dict[str, list[str]] = {}
    for audited in result.records:
        if audited.noise.state == "never effective":
            ids_by_reason.setdefault("; ".join(audited.noise.reasons), []).append(audited.record.id)
    count = sum(map(len, ids_by_reason.values()))
    console().print(styled((f"\n{counted(count, 'arm')} whose noise was never effective", "bold")))
    for reason, ids in ids_by_reason.items():
        console().print(", ".join(ids))
        _print_remarks(reason)


def _print_records(result: "Audit") -> None:
    console().print(styled((f"\n{len(result.records)} records", "bold")))
    for audited in result.records:
        final = "no result" if audited.record.final_accuracy is None else f"{audited.record.final_accuracy:.2f} %"
        console().print(f"{audited.record.id}: {final}; noise: {audited.noise.state}")
        news = audited.noise.reasons if audited.noise.state == "not as named" else ()
        _print_remarks(*news, *audited.confounds)


def _print_remarks(*remarks: str) -> None:
    if any(remarks):
        print_indented("; ".join(remarks), by=4)


def _p(value: float) -> str:
    return "p < 1e-9" if value < 1e-9 else f"p = {value:.2g}"
