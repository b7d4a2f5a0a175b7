"""1,000 runs x 5 evaluations x 1,319 problems: what `fp4rl report` takes, in a fresh process, and the size of its page.

    python benchmarks/report.py [--runs 1000] [--arms 40] [--folder build/report-benchmark] [--keep] [--write]

The runs are made up (seeded), in the layout that the runner writes; the answers of runs are links to a few files.
`--write` puts the table into benchmarks/results/report.md. Fails above 5 s by the clock or 5 MB.
"""

import argparse
import os
import platform
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.matrix import PlannedRun, planned
from fp4rl.lab.provenance import code_digest
from fp4rl.spec.experiment import Suite
from fp4rl.spec.records import read_result, read_sites
from planted.commands import item, tries, written
from planted.records import line

PROBLEMS, STEPS, SITES, VARIANTS = 1319, 30, 28, 8
EVALUATIONS = ((0, "full"), (0, "deployment"), (15, "deployment"), (STEPS, "full"), (STEPS, "deployment"))
LIMIT_S, LIMIT_BYTES = 5.0, 5_000_000
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def described(arms: int, runs: int) -> Suite:
    """A suite of `arms` learning rates with `runs` runs in all, and a question for each arm but the first."""
    injection = {"mode": "w4a4", "deployment": "compressed_tensors"}
    names = [f"lr{number}" for number in range(arms)]
    questions = [
        {
            "question": f"Is {name} better than {names[0]}?",
            "treatment": f"{name}@deployment",
            "control": f"{names[0]}@deployment",
            "factors": ["training.lr"],
        }
        for name in names[1:]
    ]
    return Suite.model_validate(
        {
            "suite": "big",
            "seeds": list(range(runs // arms)),
            "base": {
                "training": {"steps": STEPS},
                "injection": injection,
                "evaluation": {
                    "count": PROBLEMS,
                    "deployment": "compressed_tensors",
                    "profiles": ["full", "deployment"],
                },
            },
            "arms": {name: {"training": {"lr": 1e-4 * (1 + number)}} for number, name in enumerate(names)},
            "comparisons": questions,
        }
    )


def make_suite(folder: Path, suite: Suite) -> None:
    """Write the suite's folder with every run finished; runs that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite.model_dump(mode="json"), sort_keys=False))
    shelf = make_answers(folder.parent / "answers")
    runs = planned(suite)
    for number, run in enumerate(runs, 1):
        make_run(folder, run, shelf, random.Random(number))
        written(number, len(runs))


def make_answers(folder: Path) -> RunFolder:
    """Write VARIANTS sets of answers, from which runs take theirs."""
    shelf, draw = RunFolder(folder), random.Random(0)
    difficulty = [draw.betavariate(1.2, 0.8) for _ in range(PROBLEMS)]
    for variant in range(VARIANTS):
        shelf.write_items(variant, "any", [item(n, draw.random() < chance) for n, chance in enumerate(difficulty)])
    return shelf


def make_run(folder: Path, run: PlannedRun, shelf: RunFolder, draw: random.Random) -> None:
    own = RunFolder(folder / run.run_id)
    if own.finished:
        return
    own.write_spec(yaml.safe_dump(run.experiment.model_dump(mode="json"), sort_keys=False))
    write_logs(own, draw)
    (own.path / "items").mkdir(exist_ok=True)
    evaluations = []
    for step, profile in EVALUATIONS:
        answers = shelf.path / "items" / f"{draw.randrange(VARIANTS)}-any.parquet"
        os.link(answers, own.path / "items" / f"{step}-{profile}.parquet")
        evaluations.append(evaluation(step, profile, 0.5 + step / 100 + draw.gauss(0, 0.01)))
    own.write_result(
        read_result(
            {
                "run_id": run.run_id,
                "suite": run.suite,
                "arm": run.arm,
                "seed": run.seed,
                "spec_digest": run.spec_digest,
                "code_digest": code_digest(),
                "versions": {"python": "3.11.9", "torch": "2.13.0"},
                "evaluations": evaluations,
                "evidence": {
                    "sites": SITES,
                    "calls": {"rollout": 490 * SITES, "training": 48 * SITES},
                    "live_equals_fresh": True,
                    "master_unharmed": True,
                    "weights_changed": 1.0,
                },
                "steps_asked": STEPS,
                "steps_done": STEPS,
                "wall_s": 21.5,
            }
        )
    )


def write_logs(own: RunFolder, draw: random.Random) -> None:
    names = ["accuracy/rollout", "entropy", "response_length/mean", *(f"metric/{number}" for number in range(30))]
    for step in range(1, STEPS + 1):
        own.add_metrics(step, {name: draw.random() for name in names})
        own.add_evidence(line("master", step=step - 1))
        own.add_rollouts(step, [rollout(step, number) for number in range(4)])
    own.add_evidence(line("live_equals_fresh"))
    sites = [f"model.layers.{n // 7}.{ROLES[n % 7]}" for n in range(SITES)]
    plans = [
        {"site": site, "kind": "linear", "role": site.rpartition(".")[2], "layer": n // 7, "shape": [64, 64]}
        | {"weight": "mxfp4", "input": "mxfp4"}
        for n, site in enumerate(sites)
    ]
    own.write_sites(read_sites({"digest": "table", "plans": plans, "left_out": []}))
    for phase in ("rollout", "training"):
        for site in sites:
            for point in ("weight", "input"):
                own.add_evidence(line("injection", phase=phase, site=site, point=point, calls=490, missed=None))


def rollout(step: int, number: int) -> dict[str, Any]:
    return {
        "problem_id": f"train-{step}-{number // 2}",
        "question": "A shop sells apples and pears. " * 8 + "How many are left?",
        "gold": "42",
        "completion": "First count the apples, then the pears. " * 12 + "#### 42",
        "tokens": 160,
        "truncated": False,
        "reward": 1.0,
        "strict": True,
    }


def evaluation(step: int, profile: str, strict: float) -> dict[str, Any]:
    quantized = profile != "full"
    return {
        "step": step,
        "last": step == STEPS,
        "profile": {
            "name": profile,
            "precision": "w4a4" if quantized else "full",
            "sites_digest": "table" if quantized else None,
            "noise": "off",
            "scorer": "arithmetic",
            "max_new_tokens": 48,
            "sampling": "greedy",
            "items_digest": "ba9876543210",
        },
        "n": PROBLEMS,
        "strict": strict,
        "flexible": strict,
        "formatted": 0.99,
        "truncated": 0.01,
        "mean_length": 22.4,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--arms", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("build/report-benchmark"))
    parser.add_argument("--keep", action="store_true", help="leave the made-up runs where they are")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/report.md")
    asked = parser.parse_args()
    folder = asked.folder / "big"
    make_suite(folder, described(asked.arms, asked.runs))
    measured = tries("report", str(folder))
    size = (folder / "report.html").stat().st_size
    lines = [
        f"`fp4rl report` over {asked.runs:,} runs ({asked.arms} arms) x {len(EVALUATIONS)} evaluations x {PROBLEMS:,} "
        f"problems, each try a process of its own, its start included. The page has {size / 1e6:.2f} MB.",
        "",
        "| try | s by the clock | CPU seconds |",
        "|---|---:|---:|",
        *(f"| {number} | {wall:.2f} | {cpu:.2f} |" for number, (wall, cpu) in enumerate(measured, 1)),
        "",
        f"{os.cpu_count()} cores, Python {platform.python_version()}.",
    ]
    print("\n".join(lines))
    if asked.write:
        heading = "# The report of a large suite\n\n`python benchmarks/report.py --write` makes this page.\n\n"
        Path(__file__).with_name("results").joinpath("report.md").write_text(heading + "\n".join(lines) + "\n")
    if not asked.keep:
        shutil.rmtree(asked.folder)
    return int(min(measured).wall > LIMIT_S or size > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
