"""What `fp4rl scan` leaves behind: a fragment of advice, lines that name the files, a comparison with another scan."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4rl.cli.terminal import console, print_json
from fp4rl.spec.errors import InvalidValueError, NotFoundError

if TYPE_CHECKING:
    from fp4rl.diagnose.advice import Advice
    from fp4rl.diagnose.report import ScanReport
    from fp4rl.spec.scan import Piece, ScanRequest


def other_scan(path: Path | None) -> dict[str, Any] | None:
    """The JSON of another scan, None for a model folder; raises NotFoundError and InvalidValueError for what is
    neither."""
    if path is None or path.is_dir():
        return None
    if not path.exists():
        raise NotFoundError(f"--against {path}: does not exist; give a model folder or the JSON of another scan")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not {"model", "sites_digest", "parts"} <= set(content):
        raise InvalidValueError(f"--against {path}: is no JSON of `fp4rl scan --json`; give that, or a model folder")
    return content


def write_advice(file: Path, advice: "Advice", pieces: "Sequence[Piece] | None") -> None:
    """The fragment as YAML, its reasons above it as comments."""
    import yaml

    reasons = "".join(f"#   {reason}\n" for reason in advice.reasons)
    content = yaml.safe_dump(advice.fragment(pieces), sort_keys=False, allow_unicode=True)
    file.write_text(f"# Advice of `fp4rl scan`: {advice.strategy}\n{reasons}{content}", encoding="utf-8")


def as_json(report: "ScanReport", advice: "Advice | None", request: "ScanRequest") -> dict[str, Any]:
    """The report with the verl fork's thresholds, the advice and what was asked for, as one mapping."""
    from fp4rl.diagnose.findings import rules_as_dicts

    content = report.as_dict() | {"rules": rules_as_dicts(report)}
    content["scan"] = request.model_dump(mode="json")
    if advice is not None:
        content["advice"] = {
            "strategy": advice.strategy,
            "reasons": list(advice.reasons),
            "leave": list(advice.leave),
            "fragment": advice.fragment(request.take),
        }
    return content


def print_scan(report: "ScanReport", advice: "Advice | None", request: "ScanRequest", *, json_only: bool) -> None:
    """The tables of a scan and its advice, or one JSON document."""
    from fp4rl.cli.scan_view import show, show_advice

    if json_only:
        print_json(as_json(report, advice, request))
        return
    show(console(), report)
    if advice is not None:
        show_advice(console(), advice)


def say_written(
    html: Path | None, advise: Path | None, advice: "Advice | None", pieces: "Sequence[Piece] | None", where: str
) -> None:
    """Which files there are now, what the advice holds, and what it was asked for and has nothing to say of; `where` is
    the command that takes the advice, with {} for its file."""
    lines = [f"page: {html}"] if html else []
    if advise and advice:
        held = advice.held(pieces)
        words = " and ".join(held) or "nothing but the injection as scanned (take=[formats,noise] puts more in)"
        on = "; its noise turns AQN on where a spec has none" if "noise" in held else ""
        lines.append(f"advice: {advise} holds {words}{on}")
        empty = [piece for piece in pieces or () if piece not in held]
        lines += [f"{piece}: nothing to advise, so nothing of it is in the file" for piece in empty]
        lines.append(f"run with it: {where.format(advise)}")
    for line in lines:
        console().print(line, soft_wrap=True)


def compare(model: str, report: "ScanReport", path: Path, other: dict[str, Any] | None, *, quiet: bool) -> None:
    """Print both side by side and what differs most; leave with 1 when nothing does."""
    from fp4rl.cli.scan_view import show_totals
    from fp4rl.diagnose.compare import compare_checkpoints, compare_scans, require_difference, totals

    if other is None:
        delta = compare_checkpoints(path, model)
        require_difference(delta.identical, f"the weights of {path} and {model}")
        lines = [f"{t.name}: {t.relative:.3%}" for t in sorted(delta.tensors, key=lambda t: -t.relative)[:5]]
        words = "weights that differ most, |change| / |weight|"
    else:
        now = report.as_dict()
        rows = compare_scans(other, now)
        other_sites = other["model"] == now["model"] and other["sites_digest"] != now["sites_digest"]
        if not other_sites:  # the same model with some sites left out is the same in all others
            require_difference(all(row.a == row.b for row in rows), f"the scans {path} and of {model}")
        if not quiet:
            show_totals(console(), totals(other, now), (path.name, "this scan"))
        errors = sorted((r for r in rows if r.measure == "relative_l2"), key=lambda r: -abs(r.b - r.a))[:5]
        lines = [f"{r.site} {r.part}: {r.a:.4f} -> {r.b:.4f}" for r in errors]
        words = "sites whose relative error differs most"
    if not quiet:
        console().print(f"{words}:\n  " + "\n  ".join(lines))
