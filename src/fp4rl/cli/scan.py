"""`fp4rl scan`: measure what a format does to a model, site by site, and advise."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4rl.cli.injections import Injections
from fp4rl.cli.options import AsJson, RunsRoot, require_writable, write_fragment
from fp4rl.cli.packed_start import say_packed, start_of
from fp4rl.cli.scan_source import ScanTarget, targets_of
from fp4rl.cli.terminal import console, print_json, progress, ready_to_round
from fp4rl.diagnose.texts import texts_of
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.scan import ScanRequest
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from fp4rl.diagnose.advice import Advice
    from fp4rl.diagnose.report import ScanReport

CONTEXT = {"ignore_unknown_options": True}  # so that an option of earlier versions gives an error that names its key
RENAMED = {
    "preset": "deployment",
    "mode": "injection",
    "task": "task.name",
    "data": "task.path",
    "dtype": "model.dtype",
    "quick": "measured",
    "spared": "leave_one_out",
    "limit": "limits.sqnr",
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
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Write static factors of NVFP4 and FP8 inputs as a fragment for `fp4rl run SPEC +FILE`."),
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with a folder or the JSON of another scan.")] = None,
    injection: Injections = None,
    runs: RunsRoot = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Measure what rounding does to every site of a model, find faulty layers, and advise.

    Keys of `model`, `task` and `injection` are those of an experiment and change the arm that is scanned; W4A16 is
    scanned where no injection is named. Several of `--injection` are scanned one after the other.

    Examples: `fp4rl scan embedded injection=w4a4 --html scan.html --advise advice.yaml`,
    `fp4rl scan suite.yaml arm=w4a4 deployment=vllm_ascend measured=false`,
    `fp4rl scan MODEL weights_only=true format=nvfp4`
    """
    _refuse_options([model, *(words or [])])
    # Everything that can be checked without torch, which takes seconds to import, is checked before it is imported.
    files = {"--html": html, "--advise": advise, "--calibrate": calibrate}
    for option, file in files.items():
        require_writable(file, option)
    other = _other_scan(against)
    targets = targets_of(model, words or [], injection or [], runs)
    _check_all(targets, files, against)
    target, request = targets[0], targets[0].request
    lines = texts_of(Path(request.text)) if request.text is not None else None

    ready_to_round()
    quiet()
    from fp4rl.cli.scan_view import compare, show
    from fp4rl.diagnose.page import page

    results = [_result(each, lines, runs, calibrate, advised=bool(advise)) for each in targets]
    report, advice = results[0]
    if advise and advice:
        write_fragment(advise, _heading(advice), advice.fragment(request.take))
    if html:
        html.write_text(page(report, advice), encoding="utf-8")
    if as_json:
        rows = [_as_dict(*each, request) for each in results]
        print_json(rows if len(rows) > 1 else rows[0])
    else:
        for each in results:
            show(*each)
        for line in _written(target, html, calibrate, advise, advice):
            console().print(line, soft_wrap=True)
    if against:
        compare(target.experiment.model.path or model, report, against, other, quiet=as_json)


def _refuse_options(words: list[str]) -> None:
    for option in (word.partition("=")[0] for word in words if word.startswith("-")):
        name = option.lstrip("-").replace("-", "_")
        key = RENAMED.get(name, name if name in ScanRequest.model_fields else None)
        cure = f"it is a key now: write {key}=VALUE" if key else "fp4rl scan --help shows its options"
        raise InvalidValueError(f"no such option: {option}; {cure}")


def _other_scan(path: Path | None) -> dict[str, Any] | None:
    """Read the JSON of another scan, None for a model folder; raises NotFoundError and InvalidValueError for others."""
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


def _check(target: ScanTarget, advise: Path | None, calibrate: Path | None, against: Path | None) -> None:
    """Raise InvalidValueError for keys that contradict each other, or that would have no effect."""
    request, given, folder = target.request, target.request.model_fields_set, target.experiment.model.path
    for key in ("take", "noise_rule", "bits"):
        if key in given and advise is None:
            raise InvalidValueError(f"{key} chooses what advice says, and none is asked for; add --advise FILE")
    weight = target.injection.weight
    if "bits" in given and weight is not None and request.bits < weight.bits_per_value:
        least = f"{weight.name} itself takes {weight.bits_per_value:g} bits a weight"
        raise InvalidValueError(f"bits {request.bits:g}: {least}; name at least that many")
    if request.weights_only:
        needs = [key for key in ("site", "measured", "leave_one_out", "text", "texts", "parts") if key in given]
        files = {"--advise": advise, "--calibrate": calibrate}
        for what in [option for option, file in files.items() if file] + needs:
            raise InvalidValueError(f"{what} needs the model, which weights_only never loads; drop one of the two")
        if folder is None:
            why = "the embedded model has none and is scanned without it"
            raise InvalidValueError(f"weights_only reads a model folder; {why}")
    if against and against.is_dir() and folder is None:
        cure = "give the JSON of another scan"
        raise InvalidValueError(f"--against {against}: the embedded model has no files to compare; {cure}")


def _heading(advice: "Advice") -> tuple[str, ...]:
    return (f"Advice of `fp4rl scan`: {advice.strategy}", *(f"  {reason}" for reason in advice.reasons))


def _check_all(targets: Sequence[ScanTarget], files: Mapping[str, Path | None], against: Path | None) -> None:
    """Check every target; InvalidValueError for a file of one scan where several injections are scanned."""
    for target in targets:
        _check(target, files["--advise"], files["--calibrate"], against)
    given = [option for option, file in {**files, "--against": against}.items() if file]
    if given and len(targets) > 1:
        raise InvalidValueError(f"{given[0]} is of one scan, and {len(targets)} injections are named; name one of them")


def _result(
    target: ScanTarget, lines: list[str] | None, runs: Path, calibrate_into: Path | None, *, advised: bool
) -> "tuple[ScanReport, Advice | None]":
    """Scan a target, from its files or as a model, under its name and limits."""
    whole = partial(_scanned, target, lines, runs, calibrate_into, advised=advised)
    report, advice = _stored(target) if target.request.weights_only else whole()
    return replace(report, model=target.name, limits=dict[str, float](target.request.limits.items())), advice


def _scanned(
    target: ScanTarget, lines: list[str] | None, runs: Path, calibrate_into: Path | None, *, advised: bool
) -> "tuple[ScanReport, Advice | None]":
    """Load the model and scan it with the given lines, or with texts of the experiment's task; write its factors."""
    from fp4rl.diagnose.advice import Options, advise
    from fp4rl.diagnose.calibration import calibrate
    from fp4rl.diagnose.scan import distribution, scan
    from fp4rl.diagnose.static_factors import static_factors
    from fp4rl.inject.resolve import resolve
    from fp4rl.rl.verify import load_saved

    spec, request = target.experiment, target.request
    texts = lines or [f"{p.prompt} {p.solution}" for p in spec.task.problems("train", request.texts)]
    start, how = start_of(spec.model, spec.task, runs), spec.model.experts_implementation
    model, tokenizer = load_saved(start, spec.model.dtype, spec.model.lora, how)
    calibration = calibrate(tokenizer, texts, batch_size=request.batch_size, longest=request.longest)
    if calibrate_into:
        factors = static_factors(model, resolve(model, target.injection), calibration)
        seen = f"{counted(calibration.texts, 'text')}, {counted(calibration.tokens, 'token')}, {calibration.digest}"
        write_fragment(calibrate_into, (f"Static factors of `fp4rl scan`, of {target.name} on {seen}",), factors)
    with progress() as advance:
        report = scan(model, target.injection, texts=calibration, spec=request, on_stage=advance)
    if request.site:
        report = replace(report, distribution=distribution(model, report, request.site))
    options = Options(noise_rule=request.noise_rule, bits_per_weight=request.bits)
    return report, advise(report, model, calibration, options) if advised else None


def _stored(target: ScanTarget) -> "tuple[ScanReport, None]":
    """Scan the weights from their files, one at a time."""
    from fp4rl.diagnose.precision import stored_weight_errors
    from fp4rl.diagnose.report import ScanReport

    folder, injection = str(target.experiment.model.path), target.injection
    say_packed(folder)
    if target.experiment.model.lora is not None:  # a fresh adapter adds 0, and packing stores the same values
        injection = injection.model_copy(update={"lora": "adapter", "frozen_base": "copy"})
    with progress() as advance:
        return ScanReport(folder, *stored_weight_errors(folder, injection, partial(advance, "weights"))), None


def _as_dict(report: "ScanReport", advice: "Advice | None", request: ScanRequest) -> dict[str, Any]:
    """Return the report, the verl fork's thresholds, the advice and the request as one mapping."""
    from fp4rl.diagnose.findings import rules_as_dicts

    content = report.as_dict() | {"rules": rules_as_dicts(report), "scan": request.model_dump(mode="json")}
    if advice is not None:
        summary = {"strategy": advice.strategy, "reasons": list(advice.reasons), "leave": list(advice.leave)}
        content["advice"] = summary | {"fragment": advice.fragment(request.take)}
    return content


def _written(
    target: ScanTarget, html: Path | None, calibrate: Path | None, advise: Path | None, advice: "Advice | None"
) -> list[str]:
    """Return lines on the files that were written."""
    lines = [f"page: {html}"] if html else []
    lines += [f"static factors: {calibrate}; run with it: {target.run_with(calibrate)}"] if calibrate else []
    return lines + (_of_advice(advise, advice, target) if advise and advice else [])


def _of_advice(file: Path, advice: "Advice", target: ScanTarget) -> list[str]:
    """Return lines on what the file of advice holds, which requested pieces it lacks, and the command that takes it."""
    pieces = target.request.take
    held = advice.held(pieces)
    words = " and ".join(held) or "nothing but the injection as scanned (take=[formats,noise] puts more in)"
    on = "; its noise turns AQN on where a spec has none" if "noise" in held else ""
    empty = [f"{p}: nothing to advise, so nothing of it is in the file" for p in pieces or () if p not in held]
    return [f"advice: {file} holds {words}{on}", *empty, f"run with it: {target.run_with(file)}"]
