"""`fp4rl scan`: what a format does to a model, site by site, and what to do about it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4rl.cli.options import RunsRoot
from fp4rl.cli.outputs import require_writable
from fp4rl.cli.scan_source import Wish, described, folder_of, injection_of, loaded
from fp4rl.cli.terminal import console, print_json, progress
from fp4rl.spec.mistakes import BadValue, NotThere, nearest

if TYPE_CHECKING:
    from fp4rl.diagnose.advice import Advice
    from fp4rl.diagnose.calibration import Calibration
    from fp4rl.diagnose.report import ScanReport
    from fp4rl.spec.injection import Injection

PIECES = ("formats", "noise", "leave", "weight_format")


def command(
    model: Annotated[str, typer.Argument(help="A Hugging Face model folder, a spec file, or the word `embedded`.")],
    mode: Annotated[
        str | None, typer.Option(help="What is rounded: w4a16 (the default), w4a4, ...; else what a spec file says.")
    ] = None,
    fmt: Annotated[
        str | None, typer.Option("--format", help="Another format in the places that the mode rounds.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Deployment preset of scale rule and rounding.")] = None,
    leave: Annotated[list[str] | None, typer.Option(help="Pattern of sites to leave out; may be repeated.")] = None,
    text: Annotated[Path | None, typer.Option(help="Calibrate on this text file.")] = None,
    task: Annotated[str, typer.Option(help="Calibrate on this task: arithmetic, or gsm8k with --data.")] = "arithmetic",
    data: Annotated[Path | None, typer.Option(help="GSM8K's JSONL or Parquet file.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="How many texts of the task.")] = 32,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Read the weights from their files, never loading the model.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Estimate sensitivity instead of measuring it.")] = False,
    spared: Annotated[bool, typer.Option("--spared", help="Also measure what sparing each site saves.")] = False,
    site: Annotated[
        str | None, typer.Option(help="Show this weight's distribution instead of the worst one's.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="The dtype that the model is loaded in (float32).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    against: Annotated[
        Path | None, typer.Option(help="Compare with a model folder or with the JSON of another scan.")
    ] = None,
    advise: Annotated[Path | None, typer.Option(help="Write advice as a fragment for `fp4rl run SPEC +FILE`.")] = None,
    take: Annotated[
        list[str] | None,
        typer.Option(help=f"What the advice holds: {', '.join(PIECES)}; what the strategy asks for by default."),
    ] = None,
    noise_rule: Annotated[
        str, typer.Option(help="global, targeted, healthy_only, proportional, inverse or zones.")
    ] = "proportional",
    limit: Annotated[
        list[str] | None, typer.Option(help="Another limit for a rule of the documents, such as sqnr=18; repeatable.")
    ] = None,
    bits: Annotated[float, typer.Option(min=1.0, help="Average bits a weight for mixed formats.")] = 4.5,
    runs: RunsRoot = Path("runs"),
) -> None:
    """Measure what rounding does to every site of a model, find faulty layers, and advise.

    Example: `fp4rl scan embedded --mode w4a4 --html scan.html --advise advice.yaml`
    """
    from fp4rl.cli.rounding import ready_to_round

    require_writable(html, "--html")
    require_writable(advise, "--advise")
    _require_scan(against)
    ready_to_round()
    experiment = described(model, task, data, dtype)
    injection = injection_of(Wish(mode, fmt, preset, leave or ()), experiment)
    _check_pieces(take)
    limits = _limits(limit)
    if weights_only:
        _refuse(advise, "--advise", "advice needs the model; drop --weights-only")
        _refuse(site, "--site", "the distribution needs the model; drop --weights-only")
        report, advice = _stored(folder_of(experiment), injection), None
    else:
        wishes = {"measured": not quick, "spared": spared}
        live = loaded(experiment, text, texts, runs)
        report = replace(_scanned(*live, injection, wishes, site), model=_name(model))
        advice = _advice(report, live, noise_rule, bits) if advise else None
    report = replace(report, limits=limits)
    if advise and advice:
        _write_advice(advise, advice, take)
    if html:
        from fp4rl.diagnose.page import page

        html.write_text(page(report, advice), encoding="utf-8")
    _print(report, advice, take, as_json)
    if not as_json:
        _say_written(html, advise, advice, take)
    if against:
        _compare(model, report, against, quiet=as_json)


def _name(model: str) -> str:
    """What the report calls it; the model that a run ends with is `final` in every run."""
    place = Path(model).resolve()
    return f"{place.parent.name}/{place.name}" if place.name == "final" else place.name


def _check_pieces(take: list[str] | None) -> None:
    for piece in take or []:
        if piece not in PIECES:
            raise BadValue(f"--take {piece!r} is no piece of advice{nearest(piece, PIECES)}")


def _limits(given: list[str] | None) -> dict[str, float]:
    from fp4rl.diagnose.rules import rule_named

    found = {}
    for one in given or []:
        name, _, value = one.partition("=")
        try:
            found[rule_named(name).name] = float(value)
        except ValueError:
            raise BadValue(f"--limit {one!r} has no number after `=`; write for example sqnr=18") from None
    return found


def _refuse(given: object, option: str, cure: str) -> None:
    if given:
        raise BadValue(f"{option} cannot be used with --weights-only: {cure}")


def _require_scan(other: Path | None) -> None:
    if other is not None and not other.exists():
        raise NotThere(f"--against {other}: does not exist; give a model folder or the JSON of another scan")


def _scanned(
    model: Any, calibration: "Calibration", injection: "Injection", wishes: dict[str, bool], site: str | None
) -> "ScanReport":
    from fp4rl.diagnose.scan import distribution, scan
    from fp4rl.spec.scan import Scan

    with progress(console(stderr=True)) as bar:
        places: dict[str, Any] = {}

        def on_stage(stage: str, done: int, total: int) -> None:
            if stage not in places:
                places[stage] = bar.add_task(stage, total=total)
            bar.update(places[stage], completed=done)

        report = scan(model, injection, texts=calibration, spec=Scan(**wishes), on_stage=on_stage)
    return replace(report, distribution=distribution(model, report, site)) if site else report


def _stored(model: str, injection: "Injection") -> "ScanReport":
    from fp4rl.models.quiet import quiet

    quiet()
    from fp4rl.diagnose.report import ScanReport
    from fp4rl.diagnose.stored import stored_weight_errors

    with progress(console(stderr=True)) as bar:
        place = bar.add_task("weights", total=None)
        table, parts, tallies = stored_weight_errors(
            model, injection, lambda done, total: bar.update(place, completed=done, total=total)
        )
    return ScanReport(_name(model), table, parts, tallies)


def _advice(report: "ScanReport", live: tuple[Any, "Calibration"], noise_rule: str, bits: float) -> "Advice":
    from fp4rl.diagnose.advice import Options, advise

    return advise(report, *live, options=Options(noise_rule=noise_rule, bits_per_weight=bits))  # type: ignore[arg-type]


def _write_advice(file: Path, advice: "Advice", pieces: list[str] | None) -> None:
    import yaml

    reasons = "".join(f"#   {reason}\n" for reason in advice.reasons)
    content = yaml.safe_dump(advice.fragment(pieces), sort_keys=False, allow_unicode=True)  # type: ignore[arg-type]
    file.write_text(f"# Advice of `fp4rl scan`: {advice.strategy}\n{reasons}{content}", encoding="utf-8")


def _print(report: "ScanReport", advice: "Advice | None", pieces: list[str] | None, as_json: bool) -> None:
    from fp4rl.cli.scan_view import show, show_advice

    if as_json:
        from fp4rl.diagnose.findings import rules_as_dicts

        found = report.as_dict() | {"rules": rules_as_dicts(report)}
        if advice is not None:
            found["advice"] = {
                "strategy": advice.strategy,
                "reasons": list(advice.reasons),
                "leave": list(advice.leave),
                "fragment": advice.fragment(pieces),  # type: ignore[arg-type]
            }
        print_json(found)
        return
    show(console(), report)
    if advice is not None:
        show_advice(console(), advice)


def _say_written(html: Path | None, advise: Path | None, advice: "Advice | None", take: list[str] | None) -> None:
    if html:
        console().print(f"page: {html}", highlight=False, markup=False, soft_wrap=True)
    if advise and advice:
        pieces = take or advice.pieces
        held = " and ".join(pieces) if pieces else "nothing but the injection as scanned (--take puts more in)"
        on = "; its noise turns AQN on where a spec has none" if "noise" in pieces else ""
        for line in (
            f"advice: {advise} holds {held}{on}",
            f"run with it: fp4rl run SPEC +{advise}; for one arm of a suite: arms.NAME=+{advise}",
        ):
            console().print(line, highlight=False, markup=False, soft_wrap=True)


def _compare(model: str, report: "ScanReport", other: Path, *, quiet: bool) -> None:
    """Print both side by side and what differs most; leave with 1 when nothing does."""
    from fp4rl.cli.scan_view import show_totals
    from fp4rl.diagnose.compare import compare_checkpoints, compare_scans, require_difference, totals

    if other.is_dir():
        delta = compare_checkpoints(other, model)
        require_difference(delta, f"the weights of {other} and {model}")
        lines = [f"{t.name}: {t.relative:.3%}" for t in sorted(delta.tensors, key=lambda t: -t.relative)[:5]]
        words = "weights that differ most, |change| / |weight|"
    else:
        before, after = json.loads(other.read_text(encoding="utf-8")), report.as_dict()
        rows = compare_scans(before, after)
        other_sites = before["model"] == after["model"] and before["sites_digest"] != after["sites_digest"]
        if not other_sites:  # the same model with some sites left out is the same in all others
            require_difference(rows, f"the scans {other} and of {model}")
        if not quiet:
            show_totals(console(), totals(before, after), (other.name, "this scan"))
        errors = sorted((r for r in rows if r.measure == "relative_l2"), key=lambda r: -abs(r.b - r.a))[:5]
        lines = [f"{r.site} {r.part}: {r.a:.4f} -> {r.b:.4f}" for r in errors]
        words = "sites whose relative error differs most"
    if not quiet:
        console().print(f"{words}:\n  " + "\n  ".join(lines), highlight=False)
