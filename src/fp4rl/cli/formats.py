"""`fp4rl formats`: list the number formats, show one in detail, or compare their errors."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any

import typer

from fp4rl.cli.options import AsJson
from fp4rl.cli.terminal import console, print_json, progress, ready_to_round, styled, table
from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.errors import InvalidValueError, shown
from fp4rl.spec.formats import FORMATS, MXFP4, Coarse, Format, describe, format_of
from fp4rl.spec.gaussian import MXFP4_RULES_DB, kept_ideal
from fp4rl.spec.plain_yaml import plain_values
from fp4rl.spec.points import MODES

RULES = {
    "floor": "floor(log2 amax) - {e}",
    "ceil": "ceil(log2 amax) - {e}",
    "rceil": "ceil(log2(amax / {largest:g}))",
    "even": "floor(log2(amax / {even:g})) + 1",
    "even_e2m1": "floor(log2(amax / {seven:g})) + 1",
    "uos": "ceil(log2(amax / 7.25))",
    "round": "round(log2(amax / {largest:g}))",
    "mse": "least squared error of floor and its neighbours",
    "fouroversix": "round(log2(amax / 6)) or round(log2(amax / 4)), the less squared error",
    "amax": "amax / {largest:g}",
}
FACTORS = {
    "tensor": "one FP32 number for the tensor of a call",
    "per_token": "one FP32 number for each row of the last axis",
    "fused": "one FP32 number for the weights that a serving kernel fuses",
    "static": "one FP32 number that was calibrated",
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
    """List the number formats and modes, show one in detail, or compare their errors.

    Examples: `fp4rl formats`, `fp4rl formats mxfp4`, `fp4rl formats --compare`
    """
    if compare and name:
        cure = "leave the name away, or leave --compare away to see one"
        raise InvalidValueError(f"--compare measures all formats; {cure}")
    if compare:
        _compare(as_json)
    elif name:
        cure = "try '{name: mxfp4, block: 16}'"
        _show_one(format_of(plain_values(name, shown(name), cure) if "{" in name else name), as_json)
    else:
        _list(as_json)


def _list(as_json: bool) -> None:
    if as_json:
        modes = {mode.name: mode.meaning for mode in MODES.values()}
        print_json({"formats": [_facts(fmt) for fmt in FORMATS.values()], "modes": modes})
        return
    screen = console()
    names = ("format", "bits", "element", "block", "scale", "rule", "largest", "ideal dB")
    screen.print(table(*names, rows=map(_row, FORMATS.values())))
    screen.print(styled(("\nGrids", "bold"), ": the magnitudes that an element can hold, in units of its scale"))
    elements = [e for e in dict.fromkeys(fmt.element for fmt in FORMATS.values()) if e.bits <= 8]
    grids = ((e.name, str(2 * len(e.grid())), _grid(e.grid(), ends=4)) for e in elements)
    screen.print(table("element", "codes", "magnitudes", rows=grids))
    screen.print(styled(("\nModes", "bold"), ": formats of all linear layers at once, as `injection: w4a4`"))
    screen.print(table("", "", rows=((mode.name, mode.meaning) for mode in MODES.values())))
    screen.print(
        "\nbits: stored for one value. ideal dB: SQNR on Gaussian data, the format's own floor; a mean over eight "
        "sizes within an octave,\nbecause a scale that is a power of two fits some sizes better (--compare takes one). "
        "Who rounds by which rule, and what serves it: `fp4rl deployments`."
    )


def _row(fmt: Format) -> tuple[str, ...]:
    return (
        *(fmt.name, _bits(fmt.bits_per_value), fmt.element.name, _block(fmt), SCALES[fmt.scale]),
        *(fmt.scale_rule, f"{fmt.element.largest:.5g}", f"{_ideal(fmt)['sqnr_db']:.1f}"),
    )


def _show_one(fmt: Format, as_json: bool) -> None:
    if as_json:
        print_json(_facts(fmt) | {"ideal_gaussian": _ideal(fmt), "deployments": dict(_under_deployments(fmt))})
        return
    screen = console()
    screen.print(styled((fmt.name, "bold"), f"  {_bits(fmt.bits_per_value)} bits a value"))
    screen.print(table("", "", rows=_in_words(fmt)))
    ideal = ((key, f"{value:.4g}") for key, value in _ideal(fmt).items())
    screen.print("", table("error on ideal Gaussian data", "", rows=ideal), sep="\n")
    if fmt == MXFP4:
        rules = MXFP4_RULES_DB.items()
        rows = ((rule, _formula(replace(fmt, scale_rule=rule)), f"{decibels:.2f}") for rule, decibels in rules)
        screen.print("", table("scale rule", "exponent", "ideal dB", rows=rows), sep="\n")
    if sides := [(name, both["weight"], both["input"]) for name, both in _under_deployments(fmt)]:
        screen.print("", table("deployment", "weights", "inputs", rows=sides), sep="\n")


def _in_words(fmt: Format) -> Iterator[tuple[str, str]]:
    element = fmt.element
    bits = f"1 sign, {element.exponent_bits} exponent, {element.mantissa_bits} mantissa"
    yield "element", f"{element.name} ({bits}); largest {element.largest:g}, smallest {element.smallest:g}"
    if element.bits <= 8:
        yield "grid", _grid(element.grid())
    yield "block", _block(fmt) + (" of the last axis; a last block may be short" if fmt.block else "")
    yield "scale", SCALES[fmt.scale] + (", one for a block" if fmt.block else "")
    if fmt.scale != "none":
        yield "rule", f"{fmt.scale_rule}: {'exponent = ' if fmt.scale == 'e8m0' else ''}{_formula(fmt)}"
    if fmt.scale_epsilon:
        yield "epsilon", f"{fmt.scale_epsilon:g}, added to what the rule takes the logarithm of"
    if fmt.scale_min_exponent is not None:
        yield "least scale", f"2^{fmt.scale_min_exponent}"
    if fmt.scale_math != "exact":
        yield "arithmetic", f"of the rule: in the dtype {fmt.scale_math}".replace("dtype tensor", "tensor's own dtype")
    if fmt.scale in ("e4m3", "fp32"):
        fits = "" if fmt.calibrated is None else f", for magnitudes up to {fmt.calibrated:g}"
        yield "factor", f"{fmt.factor}: {FACTORS[fmt.factor]}{fits}"
    yield "rounding", fmt.rounding
    if fmt.coarse:
        yield "coarse", f"one FP32 scale for {fmt.coarse.columns} columns, chosen by {fmt.coarse.choice}"
    if fmt.rotation:
        yield "rotation", f"Hadamard {fmt.rotation} along the last axis"
    if fmt.fallback:
        yield "fallback", f"{fmt.fallback:g} of a row's blocks, those of the largest magnitude, are rounded twice"


def _formula(fmt: Format) -> str:
    element, top = fmt.element, 2.0**fmt.element.max_exponent
    even = (2 - 2.0 ** -(element.mantissa_bits + 1)) * top
    return RULES[fmt.scale_rule].format(e=element.max_exponent, largest=element.largest, even=even, seven=1.75 * top)


def _under_deployments(fmt: Format) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield how each deployment rounds the format that takes it for weights; nothing for one that none fixes."""
    for deployment in DEPLOYMENTS.values() if fmt.scale == "e8m0" and fmt.rounding != "stochastic" else ():
        sides = {"weight": "", "input": "another rule" if deployment.kernel.inputs else "not rounded"}
        for side in sides:
            with suppress(InvalidValueError):
                rounded = deployment.at(side, fmt)
                sides[side] = f"{rounded.scale_rule}, {rounded.rounding}"
        if sides["weight"]:
            yield deployment.name, sides


def _ideal(fmt: Format) -> dict[str, float]:
    """Return the stored figures of a format; measured now for a format without any."""
    if (kept := kept_ideal(fmt)) is not None:
        return kept
    from fp4rl.numerics.errors import gaussian_ideal

    return dict(gaussian_ideal(fmt))


def _compare(as_json: bool) -> None:
    from fp4rl.numerics.errors import DATA, errors_on

    ready_to_round()
    rows: list[dict[str, Any]] = []
    compared = list(_compared())
    with progress() as advance:
        for label, fmt in compared:
            rows.append({"format": label, "bits_per_value": fmt.bits_per_value, "errors": dict(errors_on(fmt))})
            advance("measuring", len(rows), len(compared))
    if as_json:
        print_json(rows)
        return
    cells = (
        (
            *(row["format"], _bits(row["bits_per_value"])),
            *(f"{100 * m['relative_l2']:5.2f} %  {m['sqnr_db']:4.1f}" for m in row["errors"].values()),
        )
        for row in rows
    )
    screen = console()
    screen.print(table("format=", "bits=", *(f"{kind.replace('_', ' ')}=" for kind in DATA), rows=cells))
    screen.print("\nRoot mean square of the error over that of the values, and SQNR in dB.")
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
            yield "mxfp4 fallback 0.25", replace(fmt, fallback=0.25)


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
        "scale_epsilon": fmt.scale_epsilon,
        "scale_math": fmt.scale_math,
        "scale_min_exponent": fmt.scale_min_exponent,
        "factor": fmt.factor,
        "calibrated": fmt.calibrated,
        "rounding": fmt.rounding,
        "coarse": vars(fmt.coarse) if fmt.coarse else None,
        "rotation": fmt.rotation,
        "fallback": fmt.fallback,
    }


def _bits(value: float) -> str:
    """Return bits with up to four decimals, such as 4.25, 4.3125 or 8."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _block(fmt: Format) -> str:
    return f"{fmt.block[0]} x {fmt.block[1]}" if fmt.block else ("tensor" if fmt.scale != "none" else "-")


def _grid(values: tuple[float, ...], ends: int = 6) -> str:
    shown = values if len(values) <= 16 else (*values[:ends], None, *values[-ends:])
    return " ".join("..." if v is None else f"{v:.3g}" if v < 0.01 else f"{v:g}" for v in shown)
