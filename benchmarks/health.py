"""How often the monitor is wrong on healthy runs, and how soon it sees a failure: on real runs and synthesised courses.

`python benchmarks/health.py [--healthy 4] [--faults 1] [--write]`. Real runs are those of the embedded model in
`planted/`, 40 steps each, 5 to 30 s of one core; a finished one is kept in `--keep` and not run again, and `--minutes`
ends a long series early, to be gone on with by the same command. `--write` puts the tables into
`docs/concepts/health.md` and every run into `results/health.md`. The thresholds were settled on other runs than these:
healthy runs are numbered from `--first`, planted failures have the seeds from `--first-fault` on, and lower numbers are
for looking at.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import chi2

from fp4rl.lab.foreign.reader import read_log
from fp4rl.models.quiet import quiet
from fp4rl.rl.events import Evaluated, Event, StepDone
from fp4rl.rl.health.monitor import Monitor, replay
from fp4rl.rl.inputs import start_folder
from fp4rl.rl.session import Run
from fp4rl.rl.train import train
from fp4rl.spec.digest import digest
from fp4rl.spec.experiment import Experiment
from planted.courses import HEALTHY, NEVER_PROVOKED, ONSET, SEEN
from planted.faults import FAULTS, STEPS, Fault, Planted
from planted.healthy import SMALL, acts_in, setting, was_healthy

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "health.md"
PAGE = HERE.parent / "docs" / "concepts" / "health.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
LENGTH = 40
Rows = list[tuple[int, dict[str, float]]]


class Bench:
    """Real runs, each kept in one file once it is finished; None for one that there was no time for."""

    def __init__(self, keep: Path, until: float) -> None:
        self.keep = keep
        self.until = until
        self.models = keep / "models"
        keep.mkdir(parents=True, exist_ok=True)

    def healthy(self, number: int) -> Rows | None:
        """The course of healthy run `number`, with the evaluation of step 0 as its first validation."""
        described = setting(number, LENGTH)
        return self._kept(f"healthy-{number}", described, lambda folder: self._train(described, folder))

    def fault(self, fault: Fault, seed: int, onset: int) -> Rows | None:
        """The course of a run that meets `fault` after `onset` steps."""
        described = fault.described(seed, onset)
        name = f"{''.join(c if c.isalnum() else '-' for c in fault.name)}-{onset}-{seed}"
        return self._kept(name, described, lambda folder: self._plant(described, folder, fault, onset))

    def _kept(self, name: str, described: dict[str, Any], go: Callable[[Path], Rows]) -> Rows | None:
        file = self.keep / f"{name}-{digest(described)}.json"
        if not file.is_file():
            if time.monotonic() > self.until:
                return None
            print(f"{name} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                rows = go(Path(folder))
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps({"spec": described, "rows": rows}), encoding="utf-8")
            partial.rename(file)
        return [(step, metrics) for step, metrics in json.loads(file.read_text(encoding="utf-8"))["rows"]]

    def _train(self, described: dict[str, Any], folder: Path) -> Rows:
        rows: Rows = []

        def keep(event: Event) -> None:
            if isinstance(event, StepDone):
                rows.append((event.step, event.metrics))
            elif isinstance(event, Evaluated) and event.evaluation.step == 0:
                rows.append((0, {"accuracy/validation": event.evaluation.share("strict")}))

        train(Experiment.model_validate(described), folder, self.models, keep)
        return rows

    def _plant(self, described: dict[str, Any], folder: Path, fault: Fault, onset: int) -> Rows:
        rows: Rows = []
        experiment = Experiment.model_validate(described)
        start = start_folder(experiment.model, experiment.task, self.models)

        def keep(event: Event) -> None:
            if isinstance(event, StepDone):
                rows.append((event.step, event.metrics))

        run = Run(experiment, folder, start, keep)
        Planted(run, fault, onset).train()
        return rows


class HealthyRuns:
    """What the monitor said on runs that were healthy, and on those that turned out not to be."""

    def __init__(self, numbers: Iterable[int], bench: Bench) -> None:
        self.lines: list[str] = []
        self.steps = self.runs = self.missing = 0
        self.of_few = 0
        self.classes: dict[str, int] = {}
        self.alarms: list[str] = []
        self.ill: list[str] = []
        for number in numbers:
            rows = bench.healthy(number)
            if rows is None:
                self.missing += 1
            else:
                self._add(number, rows)

    def _add(self, number: int, rows: Rows) -> None:
        monitor, _ = replay(rows)
        trained = [row for row in rows if row[0] > 0]
        told = [f"{a.check} at {a.step}" for a in monitor.alarms]
        healthy = was_healthy(trained)
        if healthy:
            self.runs, self.steps = self.runs + 1, self.steps + len(trained)
            self.of_few += len(trained) if _answers(number) <= SMALL else 0
            self.classes[acts_in(number)] = self.classes.get(acts_in(number), 0) + len(trained)
            self.alarms += [f"run {number}: {words}" for words in told]
        else:
            self.ill.append(f"run {number}: {', '.join(told) or 'no alarm'}")
        self.lines.append(_line(number, trained, "" if healthy else "accuracy fell; ", told))

    def sentence(self) -> str:
        """The figure that counts, with an exact 95 % interval."""
        low, high = rate(len(self.alarms), self.steps)
        return (
            f"{len(self.alarms)} false alarms in {self.steps} steps of {self.runs} healthy runs: "
            f"{1000 * len(self.alarms) / self.steps:.2f} in 1,000 steps, 95 % interval {low:.2f} to {high:.2f}"
        )

    def beside(self) -> str:
        """How the steps are made up."""
        classes = ", ".join(f"{name} {steps}" for name, steps in sorted(self.classes.items()))
        return f"{self.of_few} of the steps have 4 or 8 answers, the others 32 or 64. Steps by what acts: {classes}"


def _answers(number: int) -> int:
    recipe = setting(number, LENGTH)["training"]
    return int(recipe["train_batch_size"] * recipe["rollout_n"])


def rate(alarms: int, steps: int) -> tuple[float, float]:
    """Exact 95 % interval of a Poisson rate, per 1,000 steps."""
    low = chi2.ppf(0.025, 2 * alarms) / 2 if alarms else 0.0
    return 1000 * low / steps, 1000 * chi2.ppf(0.975, 2 * alarms + 2) / 2 / steps


def _line(number: int, rows: Rows, beside: str, told: list[str]) -> str:
    described = setting(number, LENGTH)
    recipe = described["training"]
    prompts, answers = recipe["train_batch_size"], recipe["rollout_n"]
    more = [
        word
        for word, there in (
            ("LoRA", "lora" in described["model"]),
            ("bfloat16", described["model"]["dtype"] == "bfloat16"),
            ("KL", recipe["kl_loss_coef"]),
            ("distilled", "distillation" in recipe),
            (f"TIS {recipe['rollout_correction']['rollout_is']}", recipe["rollout_correction"]["rollout_is"] != "none"),
            ("no filter", not recipe["filter_groups"]["enable"]),
            ("masked", recipe["mask_truncated"]),
        )
        if there
    ]
    accuracy, span = [metrics["accuracy/rollout"] for _, metrics in rows], max(3, len(rows) // 10)
    entropy = [metrics["entropy"] for _, metrics in rows if metrics.get("sampling/trained_groups")]
    return (
        f"| {number} | {recipe['algorithm']} | {acts_in(number)} | {prompts} x {answers} | {recipe['lr']:g} "
        f"| {prompts // recipe['mini_batch_size']} "
        f"| {described['task']['difficulty']} | {', '.join(more)} "
        f"| {statistics.mean(accuracy[:span]):.2f} -> {statistics.mean(accuracy[-span:]):.2f} "
        f"| {entropy[0]:.3f} -> {entropy[-1]:.3f} | {beside}{', '.join(told) or 'no alarm'} |"
    )


def of_faults(bench: Bench, seeds: range) -> tuple[list[str], int]:
    """(a table line per failure and onset, runs that there was no time for)."""
    lines, missing = [], 0
    for fault in FAULTS:
        for onset in fault.onsets:
            courses = [bench.fault(fault, seed, onset) for seed in seeds]
            missing += courses.count(None)
            monitors = [replay(rows)[0] for rows in courses if rows is not None]
            lines.append(_fault_line(fault.name, onset, monitors))
    return lines, missing


def _fault_line(name: str, onset: int, monitors: list[Monitor]) -> str:
    first = [next((a for a in m.alarms if a.step > onset), None) for m in monitors]
    before = sum(a.step <= onset for m in monitors for a in m.alarms)
    delays = [str(a.step - onset) if a else f"none in {STEPS}" for a in first]
    checks = dict.fromkeys(a.check for m in monitors for a in m.alarms if a.step > onset)
    where = f"step {onset + 1} on" if onset else "the first step on"
    return f"| {name} | {where} | {', '.join(delays)} | {', '.join(f'`{c}`' for c in checks)} | {before} |"


def of_courses(count: int) -> list[str]:
    """A table line per synthesised failure, and the false alarms on as many synthesised healthy runs."""
    lines = []
    for courses, kind in ((SEEN, "seen for real"), (NEVER_PROVOKED, "never provoked")):
        for course, expected in courses.items():
            delays = [_delay(course(seed), expected) for seed in range(2000, 2000 + count)]
            found = sorted(d for d in delays if d is not None)
            share = sum(d <= 10 for d in found) / count
            median, late, worst = found[len(found) // 2], found[int(0.95 * len(found))], found[-1]
            missed = f", {count - len(found)} missed" if len(found) < count else ""
            name = course.__name__.replace("_", " ")
            lines.append(f"| {name} ({kind}) | {median} / {late} / {worst}{missed} | {share:.1%} |")
    return lines


def _delay(rows: list[dict[str, float]], expected: set[str]) -> int | None:
    monitor, _ = replay(enumerate(rows, start=1))
    return next((a.step - ONSET for a in monitor.alarms if a.check in expected and a.step > ONSET), None)


def healthy_courses(course: Callable[[int], list[dict[str, float]]], count: int) -> str:
    """False alarms on synthesised healthy runs."""
    monitors = [replay(enumerate(course(seed), start=1))[0] for seed in range(2000, 2000 + count)]
    alarms, steps = [a.check for m in monitors for a in m.alarms], sum(m.steps for m in monitors)
    which = f" ({', '.join(sorted(set(alarms)))})" if alarms else ""
    return f"{len(alarms)} false alarms in {steps} steps of {count} synthesised healthy runs{which}"


def public_log(path: Path) -> str:
    """What the monitor says of a healthy log that others published."""
    dialect, log = read_log(path)
    monitor, said = replay(log.in_order().items())
    return f"{len(monitor.alarms)} alarms and {len(said)} remarks in {monitor.steps} steps of a {dialect} log"


def main() -> None:
    """Run what is missing, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", type=int, default=4, help="healthy runs")
    parser.add_argument("--first", type=int, default=1580, help="number of the first healthy run")
    parser.add_argument("--faults", type=int, default=1, help="seeds of every planted failure")
    parser.add_argument("--first-fault", type=int, default=304, help="the first of these seeds")
    parser.add_argument("--courses", type=int, default=50, help="synthesised courses of every kind")
    parser.add_argument("--log", type=Path, help="a public healthy log")
    parser.add_argument("--keep", type=Path, default=Path("runs/health"))
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no new run after this long")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    bench = Bench(asked.keep, time.monotonic() + 60 * asked.minutes)
    runs = HealthyRuns(range(asked.first, asked.first + asked.healthy), bench)
    faults, missing = of_faults(bench, range(asked.first_fault, asked.first_fault + asked.faults))
    if runs.missing or missing:
        raise SystemExit(f"{runs.missing} healthy and {missing} planted runs are still to do: the same command goes on")
    every = [HEAD_RUNS, RULE_RUNS, *runs.lines]
    print("\n".join(every))
    text = page(runs, faults, asked)
    print(text)
    if asked.write:
        RESULTS.write_text("# Healthy runs, one by one\n\n" + "\n".join(every) + "\n", encoding="utf-8")
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + text + rest[rest.index(END) :], encoding="utf-8")


HEAD_RUNS = (
    "| run | algorithm | what acts | prompts x answers | lr | updates | difficulty | besides | rollout accuracy "
    "| entropy | alarms |"
)
RULE_RUNS = "|---|---|---|---|---|---|---|---|---|---|---|"


def page(runs: HealthyRuns, faults: list[str], asked: argparse.Namespace) -> str:
    """The measured part of docs/concepts/health.md."""
    false = [f"- Embedded model: {runs.sentence()}." + _which(runs.alarms), f"- {runs.beside()}."]
    if runs.ill:
        false.append(f"- Left out, since accuracy fell in them beyond sampling error: {'; '.join(runs.ill)}.")
    false += [f"- Synthesised{words}: {healthy_courses(course, asked.courses)}." for course, words in HEALTHY.items()]
    if asked.log is not None:
        false.append(f"- A public healthy run: {public_log(asked.log)}.")
    lines = [
        "**False alarms** (at most 1 in 1,000 steps is the aim; every run stands in `benchmarks/results/health.md`).",
        "",
        *false,
        "",
        f"**Failures planted in real runs** of the embedded model, seeds of each: {asked.faults}; steps from the onset "
        "to the first alarm (at most 10 is the aim).",
        "",
        "| failure | from | steps to the alarm | checks that spoke | false alarms before |",
        "|---|---|---|---|---|",
        *faults,
        "",
        f"**Synthesised failures**, {asked.courses} courses each, from step {ONSET + 1} of a healthy run on.",
        "",
        "| course | steps to the alarm: median / 95th percentile / worst | within 10 |",
        "|---|---|---|",
        *of_courses(asked.courses),
        "",
    ]
    return "\n".join(lines)


def _which(alarms: list[str]) -> str:
    return f" They are: {'; '.join(alarms)}." if alarms else ""


if __name__ == "__main__":
    main()
