"""`fp4rl scan`: what a format does to a model, site by site, and what to do about it."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4rl.cli.options import RunsRoot
from fp4rl.cli.outputs import require_writable
from fp4rl.cli.scan_source import (
    ScanRequest,
    Source,
    described,
    folder_of,
    injection_of,
    loaded,
    replaced,
    takes_advice,
)
from fp4rl.cli.terminal import console, progress
from fp4rl.spec.errors import InvalidValueError, nearest

if TYPE_CHECKING:
    from fp4rl.diagnose.advice import Advice
    from fp4rl.diagnose.calibration import Calibration
    from fp4rl.diagnose.report import ScanReport
    from fp4rl.spec.injection import Injection

PIECES = ("formats", "noise", "leave", "weight_format")


def command(
    model: Annotated[str, typer.Argument(help="A Hugging Face model folder, a spec file, or the word `embedded`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="For a spec file: key.path=value.")] = None,
    arm: Annotated[str | None, typer.Option(help="Which arm of a suite; else the first that rounds.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="What is rounded, instead of the spec's own: w4a16 (the default), w4a4, ...")
    ] = None,
    fmt: Annotated[
        str | None, typer.Option("--format", help="Another format wherever a linear layer is rounded.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Another deployment preset of scale rule and rounding.")] = None,
    leave: Annotated[list[str] | None, typer.Option(help="Pattern of sites to leave out; may be repeated.")] = None,
    text: Annotated[Path | None, typer.Option(help="Calibrate on this text file.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Calibrate on this task instead of the spec's: arithmetic, or gsm8k with --data.")
    ] = None,
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
        str | None, typer.Option(help="global, targeted, healthy_only, proportional (the default), inverse or zones.")
    ] = None,
    limit: Annotated[
        list[str] | None, typer.Option(help="Another limit for a rule of the documents, such as sqnr=18; repeatable.")
    ] = None,
    bits: Annotated[float | None, typer.Option(min=1.0, help="Average bits a weight for mixed formats (4.5).")] = None,
    runs: RunsRoot = Path("runs"),
) -> None:
    """Measure what rounding does to every site of a model, find faulty layers, and advise.

    Examples: `fp4rl scan embedded --mode w4a4 --html scan.html --advise advice.yaml`,
    `fp4rl scan suite.yaml --arm w4a4 --preset vllm`
    """
    from fp4rl.cli.scan_output import compare, other_scan, print_scan, say_written, write_advice

    # Everything that can be said without torch, which takes seconds to import, is said before it.
    require_writable(html, "--html")
    require_writable(advise, "--advise")
    other = other_scan(against)
    name, experiment = described(Source(model, overrides or (), arm, task, data, dtype))
    wish = ScanRequest(mode, fmt, preset, leave or ())
    injection = injection_of(wish, experiment)
    limits = _limits(limit)
    options = {"--take": take, "--noise-rule": noise_rule, "--bits": bits}
    _check_advice(advise, options, injection)
    if weights_only:
        folder_of(experiment)
        heavy = {"--advise": advise, "--site": site, "--quick": quick, "--spared": spared}
        _refuse_without_model(heavy | {"--text": text, "--task": task, "--data": data})
    if against and against.is_dir() and experiment.model.path is None:
        raise InvalidValueError(
            f"--against {against}: the embedded model has no files to compare; give the JSON of another scan"
        )
    lines = _lines(text, task, data)
    if said := replaced(wish, experiment):
        console(stderr=True).print(said, highlight=False, markup=False)

    from fp4rl.cli.rounding import ready_to_round

    ready_to_round()
    advice = None
    if weights_only:
        report = _stored(folder_of(experiment), injection)
    else:
        live = loaded(experiment, lines, texts, runs)
        report = _scanned(*live, injection, {"measured": not quick, "leave_one_out": spared}, site)
        advice = _advice(report, live, noise_rule, bits) if advise else None
    report = replace(report, model=name, limits=limits)
    if advise and advice:
        write_advice(advise, advice, take)
    if html:
        from fp4rl.diagnose.page import page

        html.write_text(page(report, advice), encoding="utf-8")
    print_scan(report, advice, take, json_only=as_json)
    if not as_json:
        say_written(html, advise, advice, take, takes_advice(model, name))
    if against:
        compare(experiment.model.path or model, report, against, other, quiet=as_json)


def _check_advice(advise: Path | None, options: dict[str, Any], injection: "Injection") -> None:
    """InvalidValueError or NotFoundError for a piece, a rule or a budget of advice that cannot be, or that nobody would
    see."""
    from fp4rl.diagnose.aqn import require_rule

    for piece in options["--take"] or []:
        if piece not in PIECES:
            raise InvalidValueError(f"--take {piece!r} is no piece of advice{nearest(piece, PIECES)}")
    if options["--noise-rule"] is not None:
        require_rule(options["--noise-rule"])
    bits, weight = options["--bits"], injection.weight
    if bits is not None and weight is not None and bits < weight.bits_per_value:
        least = f"{weight.name} itself takes {weight.bits_per_value:g} bits a weight"
        raise InvalidValueError(f"--bits {bits:g}: {least}; name at least that many")
    for option, given in options.items():
        if given and advise is None:
            raise InvalidValueError(f"{option} chooses what advice says, and none is asked for; add --advise FILE")


def _limits(given: list[str] | None) -> dict[str, float]:
    from fp4rl.diagnose.rules import rule_named

    found = {}
    for one in given or []:
        name, _, value = one.partition("=")
        try:
            found[rule_named(name).name] = float(value)
        except ValueError:
            raise InvalidValueError(f"--limit {one!r} has no number after `=`; write for example sqnr=18") from None
    return found


def _refuse_without_model(options: dict[str, Any]) -> None:
    for option, given in options.items():
        if given:
            raise InvalidValueError(f"{option} needs the model, which --weights-only never loads; drop one of the two")


def _lines(text: Path | None, task: str | None, data: Path | None) -> list[str] | None:
    from fp4rl.diagnose.texts import texts_of

    if text is not None and (task or data):
        raise InvalidValueError(
            f"--text {text} and {'--task' if task else '--data'} both name what to calibrate on; drop one"
        )
    return None if text is None else texts_of(text)


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
    return ScanReport(model, table, parts, tallies)


def _advice(
    report: "ScanReport", live: tuple[Any, "Calibration"], noise_rule: str | None, bits: float | None
) -> "Advice":
    from fp4rl.diagnose.advice import Options, advise

    given = {"noise_rule": noise_rule, "bits_per_weight": bits}
    return advise(report, *live, options=Options(**{key: value for key, value in given.items() if value}))  # type: ignore[arg-type]
