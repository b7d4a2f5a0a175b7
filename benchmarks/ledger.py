"""1,000 runs x 5 evaluations x 1,319 problems: what `runs`, `show` and `compare` take, each as a fresh process.

    python benchmarks/ledger.py [--runs 1000] [--folder build/ledger-benchmark] [--keep] [--write]

The runs are made up (seeded), in the layout that the runner writes: two arms of 300 seeds and 40 arms of 10 seeds.
`--write` puts the table into benchmarks/results/ledger.md.
"""

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import yaml

from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.spec.digest import digest
from fp4rl.spec.records import Sites, read_result
from planted.commands import item, took, tries, written
from planted.records import line

PROBLEMS, STEPS, EVALUATIONS = 1319, 30, (0, 8, 15, 23, 30)
LIMIT_S = 5.0
PROFILE = {
    "name": "deployment",
    "precision": "w4a4",
    "sites_digest": "0123456789ab",
    "noise": "off",
    "scorer": "arithmetic",
    "max_new_tokens": 48,
    "sampling": "greedy",
    "items_digest": "ba9876543210",
}


def make_runs(root: Path, count: int) -> None:
    """`count` finished runs below `root`; those that are there already stay."""
    rng = np.random.default_rng(0)
    difficulty = rng.beta(1.2, 0.8, PROBLEMS)
    big = count * 3 // 10
    seeds = [("big-a", seed) for seed in range(big)] + [("big-b", seed) for seed in range(big)]
    seeds += [(f"arm{number // 10}", number % 10) for number in range(count - len(seeds))]
    for number, (arm, seed) in enumerate(seeds, start=1):
        make_run(root, arm, seed, difficulty, rng)
        written(number, count)


def make_run(root: Path, arm: str, seed: int, difficulty: np.ndarray, rng: np.random.Generator) -> None:
    spec = {
        "model": {"embedded": {"hidden_size": 64}},
        "task": {"name": "arithmetic"},
        "training": {"steps": STEPS, "lr": 4e-4},
        "injection": {"mode": "w4a4", "weight": "mxfp4", "note": arm},
        "noise": None,
        "seed": seed,
    }
    run = run_folder(root, "benchmark", f"{arm}-s{seed}-{digest(spec)}")
    if run.finished:
        return
    run.write_spec(yaml.safe_dump(spec))
    run.write_sites(Sites(digest=str(PROFILE["sites_digest"]), plans=(), left_out=()))
    write_lines(run, rng)
    evaluations = []
    for step in EVALUATIONS:
        chance = np.clip(difficulty + rng.normal(0, 0.04), 0.01, 0.99)
        strict = rng.random(PROBLEMS) < chance
        run.write_items(step, "deployment", [item(index, bool(solved)) for index, solved in enumerate(strict)])
        scores = {"n": PROBLEMS, "strict": float(strict.mean()), "flexible": float(strict.mean()), "formatted": 1.0}
        evaluations.append({"step": step, "last": step == STEPS, "profile": PROFILE, "mean_length": 17.5} | scores)
    run.write_result(
        read_result(
            {
                "run_id": run.run_id,
                "arm": arm,
                "seed": seed,
                "code_digest": "0123456789ab",
                "evaluations": evaluations,
                "evidence": {"sites": 14, "calls": {"training": 420, "rollout": 900}, "master_unharmed": True},
                "steps_asked": STEPS,
                "steps_done": STEPS,
                "wall_s": 60.0,
            }
        )
    )


def write_lines(run: RunFolder, rng: np.random.Generator) -> None:
    names = [f"metric/{number}" for number in range(20)]
    for step in range(1, STEPS + 1):
        run.add_metrics(step, dict(zip(names, rng.random(20).tolist(), strict=True)))
        run.add_evidence(line("master", step=step))
    run.add_evidence(line("live_equals_fresh"))
    for phase in ("rollout", "training"):
        for site in range(14):
            run.add_evidence(line("injection", phase=phase, site=f"layers.{site}", calls=900))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("build/ledger-benchmark"))
    parser.add_argument("--keep", action="store_true", help="leave the made-up runs where they are")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/ledger.md")
    asked = parser.parse_args()
    root = asked.folder
    make_runs(root, asked.runs)
    rebuilt = took("ledger", "rebuild", "--runs", str(root)).cpu
    place = ["--runs", str(root)]
    big = asked.runs * 3 // 10
    asking: dict[str, tuple[str, ...]] = {
        "`fp4rl runs`": ("runs",),
        "`fp4rl runs --limit 0`": ("runs", "--limit", "0"),
        "`fp4rl show RUN`": ("show", "big-a-s1-"),
        "`fp4rl compare arm0 arm1` (10 against 10 seeds)": ("compare", "arm0", "arm1"),
        f"`fp4rl compare big-a big-b` ({big} against as many)": ("compare", "big-a", "big-b"),
    }
    times = {name: min(one.cpu for one in tries(*words, *place)) for name, words in asking.items()}
    size = sum(file.stat().st_size for file in root.glob("ledger.db*")) / 2**20
    answers = asked.runs * len(EVALUATIONS) * PROBLEMS
    lines = [
        f"{asked.runs:,} runs x {len(EVALUATIONS)} evaluations x {PROBLEMS:,} problems = {answers:,} answers; "
        f"{os.cpu_count()} cores, Python {platform.python_version()}. Each line is one process in CPU seconds, "
        "its start included (best of three).",
        "",
        "| command | CPU seconds |",
        "|---|---:|",
        *(f"| {name} | {seconds:.2f} |" for name, seconds in times.items()),
        f"| `fp4rl ledger rebuild` (all folders read again) | {rebuilt:.1f} |",
        "",
        f"The ledger takes {size:.0f} MiB.",
    ]
    print("\n".join(lines))
    if asked.write:
        heading = "# The ledger under load\n\n`python benchmarks/ledger.py --write` makes this table.\n\n"
        Path(__file__).with_name("results").joinpath("ledger.md").write_text(heading + "\n".join(lines) + "\n")
    if not asked.keep:
        shutil.rmtree(root)
    return int(max(times.values()) > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
