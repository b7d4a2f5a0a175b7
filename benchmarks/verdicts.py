"""How often the tests are wrong: the simulations behind docs/concepts/statistics.md, as a table.

    python benchmarks/verdicts.py [--tries 10000] [--write]

`--write` puts the table into benchmarks/results/verdicts.md.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fp4rl.lab.statistics.crossed import multi_bootstrap, two_way
from fp4rl.lab.statistics.proportions import mcnemar
from fp4rl.lab.statistics.seeds import welch
from planted.made_up import World, coverage, families_with_a_false_word, make_world, share_called

Row = tuple[str, str, str, float, int]


def by_mcnemar(treatment: np.ndarray, control: np.ndarray) -> float:
    change = treatment[0] - control[0]
    return mcnemar(int((change > 0).sum()), int((change < 0).sum())).p


def by_items(treatment: np.ndarray, control: np.ndarray) -> float:
    """The bootstrap over problems alone, by its normal approximation, on the means over the seeds."""
    change = (treatment.mean(0) - control.mean(0)).tolist()
    error = float(np.std(change, ddof=1)) / math.sqrt(len(change))
    return math.erfc(abs(float(np.mean(change))) / error / math.sqrt(2))


def by_seeds(treatment: np.ndarray, control: np.ndarray) -> float:
    return welch(treatment.mean(1).tolist(), control.mean(1).tolist()).p


def by_both(treatment: np.ndarray, control: np.ndarray) -> float:
    return two_way(treatment, control).p


def by_bootstrap(generator: np.random.Generator) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda treatment, control: multi_bootstrap(treatment, control, generator=generator, draws=400).p


def equal_arms(world: World, rng: np.random.Generator, tries: int) -> list[Row]:
    few = tries // 20
    kinds = [
        ("McNemar, problems alone", by_mcnemar, (1,), tries),
        ("paired bootstrap, problems alone", by_items, (3, 5, 8), tries),
        ("Welch over seeds", by_seeds, (3, 5, 8), tries),
        ("two-way t", by_both, (3, 5, 8), tries),
        ("Multi-Bootstrap", by_bootstrap(rng), (3, 5, 10), few),
    ]
    return [
        (name, str(seeds), "-", share_called(world, rng, test, seeds, count), count)
        for name, test, all_seeds, count in kinds
        for seeds in all_seeds
    ]


def families(world: World, rng: np.random.Generator, tries: int) -> tuple[list[Row], list[Row]]:
    words, reaches = [], []
    for seeds in (3, 5):
        for arms in (1, 4, 8):
            share = families_with_a_false_word(world, rng, arms, seeds, tries)
            words.append(("`better` or `worse`, equal arms", str(seeds), str(arms), share, tries))
            share = families_with_a_false_word(world, rng, arms, seeds, tries, margin=1.0)
            reaches.append(("`reaches`, arms worse by the margin", str(seeds), str(arms), share, tries))
    return words, reaches


def intervals(world: World, rng: np.random.Generator, tries: int) -> list[Row]:
    return [
        (
            f"Welch interval, true difference {difference:g}",
            str(seeds),
            "-",
            coverage(world, rng, difference, seeds, tries),
            tries,
        )
        for difference in (0.0, -1.0, 3.0)
        for seeds in (3, 5, 10)
    ]


def table(title: str, rows: list[Row], what: str) -> list[str]:
    lines = [f"**{title}**", "", f"| test | seeds an arm | comparisons | {what} |", "|---|---:|---:|---:|"]
    for name, seeds, arms, share, tries in rows:
        error = 100 * math.sqrt(share * (1 - share) / tries)
        lines.append(f"| {name} | {seeds} | {arms} | {100 * share:.1f} % (± {error:.1f}) |")
    return [*lines, ""]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tries", type=int, default=10_000)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/verdicts.md")
    asked = parser.parse_args()
    rng = np.random.default_rng(2026)
    world = make_world(rng)
    dominated = equal_arms(make_world(rng, problems=500, spread=5.0), rng, asked.tries)
    words, reaches = families(world, rng, asked.tries)
    lines = [
        f"1,319 problems, run-to-run standard deviation 1.5 points, {asked.tries:,} comparisons each (the "
        f"Multi-Bootstrap {asked.tries // 20:,}); ± is the simulation's own standard error.",
        "",
        *table(
            "One comparison of equal arms, at a level of 5 %", equal_arms(world, rng, asked.tries), "called different"
        ),
        *table(
            "The same where seeds dominate: 500 problems, standard deviation 5 points", dominated, "called different"
        ),
        *table("Verdicts over a family, Holm applied", words, "families with a false word"),
        *table("Non-inferiority with a margin of 1 point", reaches, "families with a false word"),
        *table("95 % intervals", intervals(world, rng, asked.tries), "hold the truth"),
    ]
    print("\n".join(lines))
    if asked.write:
        heading = "# How often the tests are wrong\n\n`python benchmarks/verdicts.py --write` makes these tables.\n\n"
        place = Path(__file__).with_name("results") / "verdicts.md"
        place.write_text(heading + "\n".join(lines).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
