"""False alarms of the monitor on healthy runs of the embedded model, each with other settings.

`python benchmarks/health.py [--runs 4] [--steps 40] [--write]`: 30 runs take about ten minutes of one core. That a run
was healthy shows in its own row: rollout accuracy at the end (mean of three steps) against the beginning.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from fp4rl.models.quiet import quiet
from fp4rl.rl.health.monitor import Monitor, replay
from fp4rl.rl.listeners import Listeners
from fp4rl.rl.train import train
from fp4rl.spec.experiment import Experiment

RESULTS = Path(__file__).parent / "results" / "health.md"
ALGORITHMS = ("dapo", "grpo", "dr_grpo", "gspo", "cispo")
ARMS: tuple[dict[str, Any], ...] = (
    {},
    {"injection": {"mode": "w4a16", "preset": "vllm"}},
    {"injection": {"mode": "w4a4", "preset": "vllm"}},
)
RATES, UPDATES = (2e-4, 4e-4), (8, 16, 4)
# (difficulty, training problems): difficulty 1 has 899 of them in all.
TASKS = ((1, 512), (2, 4096))


def setting(number: int, steps: int) -> dict[str, Any]:
    """The description of healthy run `number`: every dial turns at its own pace, so that no two runs are alike."""
    difficulty, problems = TASKS[(number // 2) % 2]
    return {
        "model": {"embedded": {"seed": number % 2}},
        "task": {"name": "arithmetic", "difficulty": difficulty, "train_count": problems},
        "training": {
            "steps": steps,
            "algorithm": ALGORITHMS[number % len(ALGORITHMS)],
            "lr": RATES[(number // 3) % 2],
            "mini_batch_size": UPDATES[number % 3],
            "filter_groups": {"enable": number % 4 != 3},
        },
        "evaluation": {"count": 50, "profiles": ["full"]},
        "seed": number,
        **ARMS[(number // 4) % 3],
    }


def course(described: dict[str, Any], folder: Path, cache: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of one run, with the evaluation of step 0 as its first validation."""
    rows: list[tuple[int, dict[str, float]]] = []

    def validated(evaluation: Any) -> None:
        if evaluation.step == 0:
            rows.append((0, {"accuracy/validation": evaluation.share("strict")}))

    listeners = Listeners(on_step=lambda step, metrics: rows.append((step, metrics)), on_evaluation=validated)
    train(Experiment.model_validate(described), folder, cache, listeners)
    return rows


def line(number: int, described: dict[str, Any], rows: list[tuple[int, dict[str, float]]], monitor: Monitor) -> str:
    """One row of the table."""
    recipe = described["training"]
    accuracy = [metrics["accuracy/rollout"] for _, metrics in rows[1:]]
    entropy = [metrics["entropy"] for _, metrics in rows[1:] if metrics.get("sampling/trained_groups")]
    arm = described.get("injection", {}).get("mode", "bf16")
    told = ", ".join(f"{a.check} at {a.step}" for a in monitor.alarms) or "none"
    return (
        f"| {number} | {recipe['algorithm']} | {arm} | {recipe['lr']:g} | {described['task']['difficulty']} "
        f"| {_mean(accuracy[:3]):.2f} -> {_mean(accuracy[-3:]):.2f} | {entropy[0]:.3f} -> {entropy[-1]:.3f} | {told} |"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Run, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first run, to go on with a broken-off series"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--keep", type=Path, help="append every course to this file, as one JSON object a line")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULTS.name} in results/")
    asked = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    lines = ["| run | algorithm | arm | lr | difficulty | rollout accuracy | entropy | alarms |", "|---|" + "---|" * 7]
    steps = alarms = 0
    with tempfile.TemporaryDirectory() as work:
        for number in range(asked.first, asked.first + asked.runs):
            described = setting(number, asked.steps)
            rows = course(described, Path(work) / str(number), Path(work) / "models")
            monitor, _ = replay(rows)
            steps, alarms = steps + len(rows) - 1, alarms + len(monitor.alarms)
            lines.append(line(number, described, rows, monitor))
            print(lines[-1], flush=True)
            if asked.keep is not None:
                with asked.keep.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"run": number, "spec": described, "rows": rows}) + "\n")
    lines.append(f"\n{alarms} alarms in {steps} steps of {asked.runs} runs")
    print(lines[-1])
    if asked.write:
        RESULTS.write_text("# False alarms on healthy runs\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
