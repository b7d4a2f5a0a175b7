"""`fp4rl scan`: what a format does to a model, site by site, and what to do about it."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp4rl.cli.options import AsJson, RunsRoot, require_writable
from fp4rl.cli.scan_output import compare, other_scan, print_scan, say_written, write_advice
from fp4rl.cli.scan_source import ScanTarget, described, loaded
from fp4rl.cli.terminal import progress, ready_to_round
from fp4rl.spec.errors import InvalidValueError

if TYPE_CHECKING:
    from fp4rl.diagnose.advice import Advice
    from fp4rl.diagnose.report import ScanReport

CONTEXT = {"ignore_unknown_options": True}  # so that an option of earlier versions is answered with its key
KEYS = {
    "--mode": "injection=w4a4",
    "--format": "format=mxfp8",
    "--preset": "preset=vllm",
    "--leave": "leave=[PATTERN]",
    "--arm": "arm=NAME",
    "--text": "text=FILE",
    "--texts": "texts=32",
    "--task": "task.name=gsm8k",
    "--data": "task.path=FILE",
    "--weights-only": "weights_only=true",
    "--quick": "measured=false",
    "--spared": "leave_one_out=true",
    "--site": "site=NAME",
    "--dtype": "model.dtype=bfloat16",
    "--take": "take=[formats,noise]",
    "--noise-rule": "noise_rule=targeted",
    "--limit": "limits.sqnr=18",
    "--bits": "bits=5",
}


def command(
    model: Annotated[str, typer.Argument(help="A Hugging Face model folder, a spec file, or the word `embedded`.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value, or +file.yaml with such keys; `fp4rl keys scan` lists them.", metavar="KEY=VALUE"
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file.")] = None,
    advise: Annotated[Path | None, typer.Option(help="Write advice as a fragment for `fp4rl run SPEC +FILE`.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Compare with a model folder or with the JSON of another scan.")
    ] = None,
    runs: RunsRoot = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Measure what rounding does to every site of a model, find faulty layers, and advise.

    Keys of `model`, `task` and `injection` are those of an experiment and change the arm that is scanned; W4A16 is
    scanned where no injection is named.

    Examples: `fp4rl scan embedded injection=w4a4 --html scan.html --advise advice.yaml`,
    `fp4rl scan suite.yaml arm=w4a4 preset=vllm measured=false`, `fp4rl scan MODEL weights_only=true format=nvfp4`
    """
    _refuse_options([model, *(words or [])])
    # Everything that can be said without torch, which takes seconds to import, is said before it.
    require_writable(html, "--html")
    require_writable(advise, "--advise")
    other = other_scan(against)
    target = described(model, words or [])
    _check(target, advise, against)
    lines = _lines(target)

    ready_to_round()
    if target.request.weights_only:
        report, advice = _stored(target), None
    else:
        report, advice = _scanned(target, lines, runs, advised=advise is not None)
    report = replace(report, model=target.name, limits=dict[str, float](target.request.limits.items()))
    if advise and advice:
        write_advice(advise, advice, target.request.take)
    if html:
        from fp4rl.diagnose.page import page

        html.write_text(page(report, advice), encoding="utf-8")
    print_scan(report, advice, target.request, json_only=as_json)
    if not as_json:
        say_written(html, advise, advice, target.request.take, target.takes_advice)
    if against:
        compare(target.experiment.model.path or model, report, against, other, quiet=as_json)


def _refuse_options(words: list[str]) -> None:
    for word in words:
        if word.startswith("-"):
            option = word.partition("=")[0]
            cure = f"it is a key now: write {KEYS[option]}" if option in KEYS else "fp4rl scan --help shows its options"
            raise InvalidValueError(f"no such option: {option}; {cure}")


def _check(target: ScanTarget, advise: Path | None, against: Path | None) -> None:
    """Raise InvalidValueError for keys that contradict each other, or that nobody would see the effect of."""
    request, given = target.request, target.request.model_fields_set
    for key in ("take", "noise_rule", "bits"):
        if key in given and advise is None:
            raise InvalidValueError(f"{key} chooses what advice says, and none is asked for; add --advise FILE")
    weight = target.injection.weight
    if "bits" in given and weight is not None and request.bits < weight.bits_per_value:
        least = f"{weight.name} itself takes {weight.bits_per_value:g} bits a weight"
        raise InvalidValueError(f"bits {request.bits:g}: {least}; name at least that many")
    if request.weights_only:
        needs = [key for key in ("site", "measured", "leave_one_out", "text", "texts", "parts") if key in given]
        for what in (["--advise"] if advise else []) + needs:
            raise InvalidValueError(f"{what} needs the model, which weights_only never loads; drop one of the two")
        _ = target.folder  # which the embedded model has not
    if against and against.is_dir() and target.experiment.model.path is None:
        raise InvalidValueError(
            f"--against {against}: the embedded model has no files to compare; give the JSON of another scan"
        )


def _lines(target: ScanTarget) -> list[str] | None:
    from fp4rl.diagnose.texts import texts_of

    return None if target.request.text is None else texts_of(Path(target.request.text))


def _scanned(
    target: ScanTarget, lines: list[str] | None, runs: Path, *, advised: bool
) -> "tuple[ScanReport, Advice | None]":
    model, calibration = loaded(target, lines, runs)
    from fp4rl.diagnose.advice import Options, advise
    from fp4rl.diagnose.scan import distribution, scan

    request = target.request
    with progress() as advance:
        report = scan(model, target.injection, texts=calibration, spec=request, on_stage=advance)
    if request.site:
        report = replace(report, distribution=distribution(model, report, request.site))
    options = Options(noise_rule=request.noise_rule, bits_per_weight=request.bits)
    return report, advise(report, model, calibration, options) if advised else None


def _stored(target: ScanTarget) -> "ScanReport":
    from fp4rl.models.quiet import quiet

    quiet()
    from fp4rl.diagnose.precision import stored_weight_errors
    from fp4rl.diagnose.report import ScanReport

    with progress() as advance:
        on_progress = partial(advance, "weights")
        table, parts, tallies = stored_weight_errors(target.folder, target.injection, on_progress)
    return ScanReport(target.folder, table, parts, tallies)
