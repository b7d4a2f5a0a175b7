"""`fp4rl formats`: every number format, what it can hold and what it costs; one in detail; all of them compared."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table

from fp4rl.cli.options import AsJson
from fp4rl.cli.terminal import console, print_json, progress, ready_to_round, styled
from fp4rl.spec.errors import InvalidValueError, shown
from fp4rl.spec.formats import FORMATS, MXFP4, Coarse, Format, describe, format_of
from fp4rl.spec.gaussian import MXFP4_RULES_DB, kept_ideal
from fp4rl.spec.modes import MODES
from fp4rl.spec.plain_yaml import plain_values
from fp4rl.spec.presets import PRESETS

RULES = {
    "floor": "floor(log2 amax) - {e}",
    "ceil": "ceil(log2 amax) - {e}",
    "rceil": "ceil(log2(amax / {largest:g}))",
    "even": "floor(log2(amax / {even:g})) + 1",
    "even_e2m1": "floor(log2(amax / {seven:g})) + 1",
    "uos": "ceil(log2(amax / 7.25))",
    "mse": "least squared error of floor and its neighbours",
    "amax": "amax / {largest:g}",
}
SCALES = {"e8m0": "E8M0", "e4m3": "E4M3 x FP32", "fp32": "FP32", "none": "none"}


def command(
    name: Annotated[
        str | None, typer.Argument(help="A format to show in detail: mxfp4, or {name: mxfp4, block: 16}.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure the error of every format on three kinds of data.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the number formats, modes and deployment presets, show one in detail, or compare their errors.

    Examples: `fp4rl formats`, `fp4rl formats mxfp4`, `fp4rl formats --compare`
    """
    if compare and name:
        raise InvalidValueError(
            "--compare measures all formats; leave the name away, or leave --compare away to see one"
        )
    if compare:
        _compare(as_json)
    elif name:
        _show_one(_parsed(name), as_json)
    else:
        _list(as_json)


def _parsed(text: str) -> Format:
    if "{" not in text:
        return format_of(text)
    return format_of(plain_values(text, shown(text), "try '{name: mxfp4, block: 16}'"))


def _list(as_json: bool) -> None:
    if as_json:
        presets = {p.name: {k: v for k, v in vars(p).items() if k != "name"} for p in PRESETS.values()}
        modes = {mode.name: mode.meaning for mode in MODES.values()}
        print_json({"formats": [_facts(fmt) for fmt in FORMATS.values()], "modes": modes, "presets": presets})
        return
    table = Table(
        "format", "bits", "element", "block", "scale", "rule", "largest", "ideal dB", box=None, pad_edge=False
    )
    for fmt in FORMATS.values():
        table.add_row(
            *(fmt.name, _bits(fmt.bits_per_value), fmt.element.name, _block(fmt), SCALES[fmt.scale]),
            *(fmt.scale_rule, f"{fmt.element.largest:.5g}", f"{_ideal(fmt)['sqnr_db']:.1f}"),
        )
    screen = console()
    screen.print(table)
    screen.print(styled(("\nGrids", "bold"), ": the magnitudes that an element can hold, in units of its scale"))
    screen.print(_grids(), highlight=False)
    screen.print(
        styled(("\nModes", "bold"), ": formats of all linear layers at once, as `injection: w4a4` or `--mode w4a4`")
    )
    screen.print(_modes(), highlight=False)
    screen.print(styled(("\nPresets", "bold"), ": what a deployment target does to MX formats, weights | inputs"))
    screen.print(_presets())
    screen.print(
        "\nbits: stored for one value. ideal dB: SQNR on Gaussian data, the format's own floor; a mean over eight "
        "sizes within an octave,\nbecause a scale that is a power of two fits some sizes better (--compare takes one)."
    )


def _grids() -> Table:
    table = Table("element", "codes", "magnitudes", box=None, pad_edge=False)
    for element in dict.fromkeys(fmt.element for fmt in FORMATS.values()):
        if element.bits <= 8:
            table.add_row(element.name, str(2 * len(element.grid())), _grid(element.grid(), ends=4))
    return table


def _modes() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for mode in MODES.values():
        table.add_row(mode.name, mode.meaning)
    return table


def _presets() -> Table:
    table = Table("preset", "weights", "inputs", "source", box=None, pad_edge=False)
    for preset in PRESETS.values():
        weights = f"{preset.weight_rule}, {preset.weight_rounding}"
        inputs = f"{preset.input_rule}, {preset.input_rounding}"
        table.add_row(preset.name, weights, inputs, preset.source)
    return table


def _show_one(fmt: Format, as_json: bool) -> None:
    if as_json:
        print_json(_facts(fmt) | {"ideal_gaussian": _ideal(fmt), "presets": dict(_under_presets(fmt))})
        return
    screen = console()
    screen.print(styled((fmt.name, "bold"), f"  {_bits(fmt.bits_per_value)} bits a value"), highlight=False)
    facts = Table(show_header=False, box=None, pad_edge=False)
    for key, value in _in_words(fmt):
        facts.add_row(key, value)
    screen.print(facts)
    screen.print(_details(fmt))


def _in_words(fmt: Format) -> Iterator[tuple[str, str]]:
    element = fmt.element
    bits = f"1 sign, {element.exponent_bits} exponent, {element.mantissa_bits} mantissa"
    yield "element", f"{element.name} ({bits}); largest {element.largest:g}, smallest {element.smallest:g}"
    if element.bits <= 8:
        yield "grid", _grid(element.grid())
    yield "block", _block(fmt) + (" of the last axis; a last block may be short" if fmt.block else "")
    yield "scale", SCALES[fmt.scale] + (", one for a block" if fmt.block else "")
    if fmt.scale != "none":
        rule = _formula(fmt)
        yield "rule", f"{fmt.scale_rule}: {'exponent = ' if fmt.scale == 'e8m0' else ''}{rule}"
    yield "rounding", fmt.rounding
    if fmt.coarse:
        yield "coarse", f"one FP32 scale for {fmt.coarse.columns} columns, chosen by {fmt.coarse.choice}"
    if fmt.rotation:
        yield "rotation", f"Hadamard {fmt.rotation} along the last axis"


def _formula(fmt: Format) -> str:
    element, top = fmt.element, 2.0**fmt.element.max_exponent
    even = (2 - 2.0 ** -(element.mantissa_bits + 1)) * top
    return RULES[fmt.scale_rule].format(e=element.max_exponent, largest=element.largest, even=even, seven=1.75 * top)


def _details(fmt: Format) -> Group:
    ideal = Table("error on ideal Gaussian data", "", box=None, pad_edge=False)
    for key, value in _ideal(fmt).items():
        ideal.add_row(key, f"{value:.4g}")
    parts = [ideal]
    if fmt == MXFP4:
        rules = Table("scale rule", "exponent", "ideal dB", box=None, pad_edge=False)
        for rule, decibels in MXFP4_RULES_DB.items():
            rules.add_row(rule, _formula(replace(fmt, scale_rule=rule)), f"{decibels:.2f}")
        parts.append(rules)
    under = Table("preset", "weights", "inputs", box=None, pad_edge=False)
    for name, sides in _under_presets(fmt):
        under.add_row(name, sides["weight"], sides["input"])
    return Group(*(item for part in (*parts, under) if part.row_count for item in ("", part)))


def _under_presets(fmt: Format) -> Iterator[tuple[str, dict[str, str]]]:
    """What each preset makes of the format; nothing for a format that presets leave alone or that sets its own rule."""
    for preset in PRESETS.values():
        try:
            weight, entry = preset.for_weight(fmt), preset.for_input(fmt)
        except InvalidValueError:
            continue
        if fmt.scale == "e8m0" and fmt.rounding != "stochastic":
            sides = {side: f"{f.scale_rule}, {f.rounding}" for side, f in (("weight", weight), ("input", entry))}
            yield preset.name, sides


def _ideal(fmt: Format) -> dict[str, float]:
    """The kept figures of a format; measured now for one that has none."""
    if (kept := kept_ideal(fmt)) is not None:
        return kept
    from fp4rl.numerics.errors import gaussian_ideal

    return dict(gaussian_ideal(fmt))


def _compare(as_json: bool) -> None:
    from fp4rl.numerics.distributions import DATA, errors_on

    ready_to_round()
    rows: list[tuple[str, float, dict[str, dict[str, float]]]] = []
    with progress(console(stderr=True)) as bar:
        for label, fmt in bar.track(list(_compared()), description="measuring"):
            rows.append((label, fmt.bits_per_value, dict(errors_on(fmt))))
    if as_json:
        print_json([{"format": label, "bits_per_value": bits, "errors": errors} for label, bits, errors in rows])
        return
    table = Table(box=None, pad_edge=False)
    for name in ("format", "bits", *(kind.replace("_", " ") for kind in DATA)):
        table.add_column(name, no_wrap=True)
    for label, bits, errors in rows:
        cells = (f"{100 * m['relative_l2']:5.2f} %  {m['sqnr_db']:4.1f}" for m in errors.values())
        table.add_row(label, _bits(bits), *cells)
    screen = console()
    screen.print(table, highlight=False)
    screen.print("\nRoot mean square of the error over that of the values, and SQNR in dB.", highlight=False)
    screen.print("512 x 2048 values of size 0.02, one size; the ideal dB of `fp4rl formats` is the mean of eight.")
    screen.print("heavy tailed: Student's t, 4 degrees. outlier channels: every 128th column 30 times as large.")


def _compared() -> Iterator[tuple[str, Format]]:
    for fmt in FORMATS.values():
        yield fmt.name, fmt
        if fmt == MXFP4:
            for rule in ("ceil", "rceil", "even", "uos", "mse"):
                yield f"mxfp4 {rule}", replace(fmt, scale_rule=rule)
            yield "mxfp4 even, rotation 32", replace(fmt, scale_rule="even", rotation=32)
            yield "mxfp4 coarse 128, search", replace(fmt, coarse=Coarse(128, "search"))


def _facts(fmt: Format) -> dict[str, object]:
    element = fmt.element
    return {
        "name": fmt.name,
        "format": describe(fmt),
        "bits_per_value": fmt.bits_per_value,
        "element": element.name,
        "largest": element.largest,
        "grid": list(element.grid()) if element.bits <= 8 else None,
        "block": list(fmt.block) if fmt.block else None,
        "scale": fmt.scale,
        "scale_rule": fmt.scale_rule if fmt.scale != "none" else None,
        "rounding": fmt.rounding,
        "coarse": vars(fmt.coarse) if fmt.coarse else None,
        "rotation": fmt.rotation,
    }


def _bits(value: float) -> str:
    """4.25, 4.3125, 8: no digit rounded away at the fourth place."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _block(fmt: Format) -> str:
    return f"{fmt.block[0]} x {fmt.block[1]}" if fmt.block else ("tensor" if fmt.scale != "none" else "-")


def _grid(values: tuple[float, ...], ends: int = 6) -> str:
    shown = values if len(values) <= 16 else (*values[:ends], None, *values[-ends:])
    return " ".join("..." if v is None else f"{v:.3g}" if v < 0.01 else f"{v:g}" for v in shown)
