"""`fp4rl power`: how many seeds an arm needs for a difference to be detected."""

from pathlib import Path
from typing import Annotated

import typer

from fp4rl.cli.ledger import opened
from fp4rl.cli.options import Address, AsJson, RunsRoot
from fp4rl.cli.terminal import console, print_json, styled
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.words import agreeing, counted

_SHOWN_AROUND = 3


def command(
    difference: Annotated[float, typer.Argument(help="Points to detect; with --margin the true difference.")],
    spread: Annotated[
        float | None, typer.Option(help="Run-to-run standard deviation in points; by default from the ledger.")
    ] = None,
    like: Annotated[str | None, typer.Option(help="A run; the spread is that of runs on its task and model.")] = None,
    chance: Annotated[float, typer.Option(help="Chance of detecting it (statistical power).")] = 0.8,
    comparisons: Annotated[int, typer.Option(min=1, help="Comparisons to correct for.")] = 1,
    margin: Annotated[float | None, typer.Option(help="Non-inferiority margin in points.")] = None,
    runs: RunsRoot = Path("runs"),
    ledger: Address = None,
    as_json: AsJson = False,
) -> None:
    """Compute how many seeds each arm needs to detect a difference of so many points.

    Example: `fp4rl power 2.5 --spread 1.57`
    """
    from fp4rl.lab.statistics.power import power, seeds_needed

    if not 0 < chance < 1:
        raise InvalidValueError(f"--chance lies between 0 and 1; got {chance}")
    source = "as given"
    if spread is None:
        spread, source = _from_ledger(runs, ledger, like)
    alpha = 0.05 / comparisons
    needed = seeds_needed(difference, spread, chance=chance, alpha=alpha, margin=margin)
    around = range(max(2, needed - _SHOWN_AROUND), needed + _SHOWN_AROUND)
    table = {seeds: power(seeds, difference, spread, alpha=alpha, margin=margin) for seeds in around}
    if as_json:
        print_json(
            {"seeds_needed": needed, "chance": chance, "spread": spread, "spread_from": source, "power": table}
            | {"difference": difference, "margin": margin, "comparisons": comparisons}
        )
        return
    basis = f", at a run-to-run standard deviation {spread:.2f} points ({source})"
    console().print(styled((f"{counted(needed, 'seed')} an arm", "bold"), basis))
    for seeds, seen in table.items():
        mark = "  <-" if seeds == needed else ""
        word = agreeing(seeds, "seed", "seeds")
        console().print(f"  {seeds:>4} {word}: seen in {100 * seen:3.0f} of 100 tries{mark}")


def _from_ledger(runs: Path, address: str | None, like: str | None) -> tuple[float, str]:
    from fp4rl.lab.ledger.query import known_spreads

    if address is None and not runs.is_dir():
        cure = "give --spread POINTS, or name their folder with --runs"
        raise NotFoundError(f"{runs}: no runs to take the spread from; {cure}")
    with opened(runs, address) as store, store.reading() as connection:
        spreads = known_spreads(connection, like)
    if not spreads:
        raise NotFoundError("the ledger holds no repeats (runs that differ in the seed alone); give --spread")
    if len(spreads) > 1:
        names = "; ".join(f"{name}: {spread.sd:.2f}" for name, spread in spreads)
        kinds = f"{len(spreads)} tasks and models ({names})"
        raise InvalidValueError(f"the ledger holds repeats of {kinds}; choose with --like RUN")
    name, spread = spreads[0]
    freedom = counted(spread.freedom, "degree of freedom", "degrees of freedom")
    return spread.sd, f"{name}, {counted(spread.groups, 'group')} of repeats, {freedom}"
