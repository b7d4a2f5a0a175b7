"""Everything that only a machine with a CUDA device can show, in one call: `make gpu-check`.

    python tools/gpu_check.py [--only tests,rounding] [--minutes 60]

Tests of kernels and of injection on the device, the share of a copy's bandwidth that rounding reaches, the benchmarks
of injection and of an RL step, and two steps of a run that vLLM samples for. Each step is a process of its own, so that
one that fails or hangs leaves the others. Writes benchmarks/results/<gpu>-check.md after every step. Without CUDA it
says so.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUITE = """
suite: gpu_check
base:
  training: {steps: 2}
  evaluation: {count: 24}
  rollout: {engine: vllm}
arms:
  w4a4: {injection: {mode: w4a4, deployment: compressed_tensors}}
  noisy: {injection: w4a16, noise: {}}
seeds: [0]
"""


@dataclass(frozen=True)
class Step:
    """A command, and what it shows. `needs` is a package without which it is skipped."""

    name: str
    shows: str
    command: tuple[str, ...]
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended: in words, its exit code (None: skipped or out of time), seconds, and its last lines."""

    step: Step
    said: str
    code: int | None
    seconds: float
    tail: str = ""


def steps(folder: Path) -> list[Step]:
    """Return the steps, in order: what is right comes before how fast it is."""
    python, suite = sys.executable, folder / "suite.yaml"
    suite.write_text(SUITE, encoding="utf-8")
    tests = ["numerics/test_triton.py", "numerics/test_cuda.py", "inject/test_cuda.py"]
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests))
    rl = (python, "benchmarks/rl.py", "--gpu", "--rounds", "4", "--write")
    run = (python, "-m", "fp4rl", "run", str(suite), "--runs", str(folder / "runs"), "--jobs", "1")
    return [
        Step("doctor", "devices, dtypes, rounding and gradients on each device", (python, "-m", "fp4rl", "doctor")),
        Step("tests", "Triton kernels against the reference, injection on the device", pytest, "triton"),
        Step(
            "rounding", "share of a copy's bandwidth, aim 85 %", (python, "benchmarks/numerics.py", "--gpu"), "triton"
        ),
        Step("injection", "generation and training under injection", (python, "benchmarks/gpu.py")),
        Step("rl", "a step of GRPO", rl, "trl"),
        Step("vllm", "two steps of a run with rollout.engine: vllm", run, "vllm"),
    ]


def run_step(step: Step, minutes: float) -> Outcome:
    """Run a step, with its output on the screen as it comes, and return how it ended."""
    if step.needs is not None and find_spec(step.needs) is None:
        return Outcome(step, f"skipped, {step.needs} is not installed", None, 0.0)
    began = time.monotonic()
    process = subprocess.Popen(
        step.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        output, _ = process.communicate(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        print(output)
        return Outcome(step, f"ended after {minutes:g} minutes", None, time.monotonic() - began, _tail(output))
    print(output)
    said = "passed" if process.returncode == 0 else f"failed with exit code {process.returncode}"
    return Outcome(step, said, process.returncode, time.monotonic() - began, _tail(output))


def page(device: str, outcomes: Sequence[Outcome]) -> str:
    """Return the results as Markdown."""
    rows = [f"| {o.step.name} | {o.step.shows} | {o.said} | {o.seconds:.0f} |" for o in outcomes]
    tails = [f"\n## {o.step.name}\n```\n{o.tail}\n```" for o in outcomes if o.tail]
    head = [f"# What `make gpu-check` printed on one {device}", "", "| step | what it shows | ended | seconds |"]
    return "\n".join([*head, "|---|---|---|---|", *rows, *tails]) + "\n"


def _tail(output: str, lines: int = 12) -> str:
    return "\n".join(output.rstrip().splitlines()[-lines:])


def main() -> int:
    """Run what is asked for; return 1 where a step failed, 0 without a CUDA device."""
    parser = argparse.ArgumentParser(description="Run everything that needs a CUDA device.")
    parser.add_argument("--only", help="names of steps, such as tests,rounding")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most, for each step")
    given = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here, so nothing was run")
        return 0
    device, outcomes = torch.cuda.get_device_name(), list[Outcome]()
    file = RESULTS / f"{device.lower().replace(' ', '-')}-check.md"
    with tempfile.TemporaryDirectory() as folder:
        planned = steps(Path(folder))
        wanted = given.only.split(",") if given.only else [step.name for step in planned]
        if unknown := set(wanted) - {step.name for step in planned}:
            print(f"gpu-check: no step is called {', '.join(sorted(unknown))}", file=sys.stderr)
            return 2
        for step in (step for step in planned if step.name in wanted):
            print(f"gpu-check: {step.name}: {step.shows}", flush=True)
            outcomes.append(run_step(step, given.minutes))
            print(f"gpu-check: {step.name}: {outcomes[-1].said}", flush=True)
            file.write_text(page(device, outcomes), encoding="utf-8")
    print(f"gpu-check: {file.relative_to(ROOT)}")
    return int(any(outcome.code for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
