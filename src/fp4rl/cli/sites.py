"""`fp4rl sites`: show what an injection would round in a model, site by site, and why the rest is left out."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4rl.cli.described import is_spec, require_here, run_described
from fp4rl.cli.options import AsJson, Deployed, FormerPreset, asked_deployment, require_writable, write_fragment
from fp4rl.cli.packed_start import say_packed
from fp4rl.cli.terminal import console, print_json, styled, table
from fp4rl.lab.matrix import single
from fp4rl.lab.serving import served_as, unserved
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import InvalidValueError, shown
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import E2M1
from fp4rl.spec.injection import Injection
from fp4rl.spec.legacy import translate
from fp4rl.spec.load import parse
from fp4rl.spec.model import Model, embedded
from fp4rl.spec.noise import Noise
from fp4rl.spec.plain_yaml import plain_values
from fp4rl.spec.points import FORMAT_POINTS, PHASES
from fp4rl.spec.retarget import under_deployment
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from fp4rl.inject.plan import SiteTable


def command(
    source: Annotated[
        str, typer.Argument(help="A model folder, `embedded` (or -m, -l), or a spec file of a suite or experiment.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes of a spec file, key.path=value.")] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="A mode or an injection, instead of the spec's.")] = None,
    deployment: Deployed = None,
    arm: Annotated[str | None, typer.Option("--arm", help="Arm of a suite; by default the first that rounds.")] = None,
    old: Annotated[
        list[str] | None,
        typer.Option("--old", help="KEY=VALUE of the verl fork (hw_error_injection, noise_injection, VERL_NOISY_OPS)."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--write", help="Write --old, translated, as a fragment for `fp4rl run SPEC +FILE`.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Print one line per site instead of one per role.")] = False,
    preset: FormerPreset = None,
    as_json: AsJson = False,
) -> None:
    """Print what is rounded in a model and in which format, what is left out, and the expected counts.

    Examples: `fp4rl sites embedded --mode w4a8`, `fp4rl sites suite.yaml --arm w4a4`,
    `fp4rl sites MODEL --old hw_error_injection.enabled=true --old hw_error_injection.error_type=mxfp4 --write old.yaml`
    """
    require_writable(write, "--write")
    if write and not old:
        raise InvalidValueError(f"--write {write}: writes what --old says, and no setting is given; name some")
    deployment = asked_deployment(deployment, preset)
    model_spec, injection = _described(source, overrides or [], arm)
    translation = translate(dict(_setting(word) for word in old)) if old else None
    warnings = translation.warnings if translation else ()
    if translation:
        injection = translation.injection
    elif mode is not None or deployment is not None:
        injection = _requested(mode, deployment, injection)
    table = _resolved(model_spec, injection)
    if write and translation:
        heading = "Settings of the verl fork, translated by `fp4rl sites --old`"
        write_fragment(write, (heading, *translation.warnings), translation.fragment())
    lacking = _lacking(table)
    if as_json:
        said = {"served_as": served_as(table.injection), "warnings": [*warnings, *lacking]}
        print_json(table.as_dict() | {"injection": table.injection.model_dump(mode="json")} | said)
        return
    for line in warnings:
        console(stderr=True).print(styled(("verl fork:", "yellow"), f" {line}"), soft_wrap=True)
    _show(table, every, lacking)
    if translation and translation.noise:
        console().print(f"noise: {_in_a_line(translation.noise)}")
    if write:
        console().print(f"translated settings: {write}; run with it: fp4rl run SPEC +{write}", soft_wrap=True)


def _in_a_line(noise: Noise) -> str:
    """Return a line such as `epoch_aware: sigma_start 0.05, ...; on norm weights`."""
    schedule = noise.schedule.model_dump(exclude={"kind"})
    settings = ", ".join(f"{key} {value:g}" for key, value in schedule.items())
    return f"{noise.schedule.kind}: {settings}; on {' and '.join(noise.targets.kinds)} weights in rollouts"


def _described(source: str, overrides: list[str], arm: str | None) -> tuple[Model, Injection]:
    if not is_spec(source):
        if overrides or arm:
            why = "is no spec file, so key=value and --arm have nothing to change; use --mode"
            raise InvalidValueError(f"{source} {why}")
        return parse(Model, embedded(source) or {"path": source}, ""), Injection.named("w4a16")
    experiment = run_described(source, overrides, arm).experiment
    return experiment.model, experiment.injection or Injection()


def _requested(mode: str | None, deployment: str | None, present: Injection) -> Injection:
    if mode is None:
        return present if deployment is None else under_deployment(present, deployment)
    cure = "write a mode such as w4a4, or a mapping such as '{weight: mxfp4, input: mxfp8}'"
    content = plain_values(mode, f"--mode {shown(mode)}", cure)
    if not isinstance(content, str | dict):
        raise InvalidValueError(f"--mode {mode!r} is neither a name nor a mapping; {cure}")
    mapping = {"mode": content} if isinstance(content, str) else content
    return parse(Injection, mapping | ({"deployment": deployment} if deployment else {}), "--mode")


def _setting(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise InvalidValueError(f"--old {word!r}: a setting is written KEY=VALUE")
    return key.strip(" '+"), value.strip().strip("'")


def _resolved(spec: Model, injection: Injection) -> "SiteTable":
    require_here([single(Experiment(model=spec), "sites")])
    quiet()
    from fp4rl.inject.resolve import resolve
    from fp4rl.models.transforms.start import described_skeleton
    from fp4rl.rl.lora import with_lora

    say_packed(spec.path)
    model = described_skeleton(spec, spec.path)
    return resolve(model if spec.lora is None else with_lora(model, spec.lora, spec.path or ""), injection)


def _lacking(sites: "SiteTable") -> list[str]:
    """Return which layers the deployment has no kernel for."""
    four_bits = [plan for plan in sites.plans if plan.weight is not None and plan.weight.element == E2M1]
    return list(unserved(sites.injection, [(plan.name, plan.site.part, plan.site.shape[-1]) for plan in four_bits]))


def _show(sites: "SiteTable", every: bool, lacking: Sequence[str]) -> None:
    screen = console()
    rows = sites.rows()
    active = [point for point in FORMAT_POINTS if any(point in row for row in rows)]
    wrong = ["errors"] if any("errors" in row for row in rows) else []
    if rows:
        names = ("site", "part", "layers", "shape", *active, *wrong)
        screen.print(table(*names, rows=(cells[: len(names)] for cells in _cells(rows, active, every))))
    screen.print(_counts(rows))
    by_reason: dict[tuple[str, str], list[str]] = defaultdict(list)
    for left in sites.left_out:
        by_reason[left.reason, left.site.part].append(left.site.name)
    if by_reason:
        screen.print("")
        cells = ((*key, str(len(names)), names[0]) for key, names in by_reason.items())
        screen.print(table("left out", "part", "sites", "such as", rows=cells))
    noted: dict[str, list[str]] = defaultdict(list)
    for row in (row for row in rows if "note" in row):
        noted[row["note"]].append(row["site"])
    for note, noted_at in noted.items():
        screen.print(f"\n{noted_at[0]}{f' and {len(noted_at) - 1} more' if noted_at[1:] else ''}: {note}")
    screen.print(f"\n{sites.injection.name} of values cast to {sites.injection.dtype}, table {sites.digest}")
    points_by_phases: dict[str, list[str]] = defaultdict(list)
    for point in (*active, *wrong):
        phases = [phase for phase in PHASES if point in sites.injection.apply_during.active(phase)]
        points_by_phases[", ".join(phases)].append(point)
    for phases_in_words, points in points_by_phases.items():
        screen.print(f"{', '.join(points)}: in {phases_in_words}")
    if sites.injection.deployment is not None:
        screen.print(f"served: {served_as(sites.injection)}")
    for line in lacking:
        screen.print(styled(("warning", "yellow"), f": {line}"))


def _cells(rows: list[dict[str, Any]], active: list[str], every: bool) -> list[tuple[str, ...]]:
    """Return a row for each site, or for all layers of a role that are rounded alike: name, layers, shape, formats."""
    layers: dict[tuple[str, ...], list[int | None]] = defaultdict(list)
    for row in rows:
        shape = " x ".join(map(str, row["shape"])) or "-"
        errors = [f"{e['kind']}@{e['point']}/{e['when']} {e['scale']:g}" for e in row.get("errors", [])]
        how = "".join(f" {word}" for word in ("merged", "packed") if row.get(word))
        formats = (_format(row.get(point)) + (how if point == "weight" else "") for point in active)
        name = row["site"] if every else row["role"]
        layers[(name, row["part"], shape, *formats, "\n".join(errors))].append(row["layer"])
    return [(name, part, _layers(numbers), *rest) for (name, part, *rest), numbers in layers.items()]


def _format(fmt: Any) -> str:
    """Return a format in words: `mxfp4`, or `mxfp4 even rotation 64 coarse 512 max`."""
    if not isinstance(fmt, dict):
        return fmt or "-"
    words = [fmt["name"]]
    for key, value in fmt.items():
        if key != "name":
            settings = value.values() if isinstance(value, dict) else [value]
            words.append(value if isinstance(value, str) else f"{key} {' '.join(map(str, settings))}")
    return " ".join(words)


def _layers(layers: list[int | None]) -> str:
    """Return layers as `0-27` or `0, 2-5`; a dash for sites outside the layers."""
    numbers = sorted({layer for layer in layers if layer is not None})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "-"


def _counts(rows: list[dict[str, Any]]) -> str:
    """Return a line such as `196 sites = 28 layers x 7`, in which a missing site is easily seen."""
    if not rows:
        return "nothing is rounded"
    per_layer = Counter(row["layer"] for row in rows)
    sizes = set(per_layer.values())
    if len(sizes) == 1 and None not in per_layer:
        return f"{counted(len(rows), 'site')} = {counted(len(per_layer), 'layer')} x {sizes.pop()}"
    return f"{counted(len(rows), 'site')} in {counted(len(per_layer), 'layer')}"
