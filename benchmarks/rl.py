"""What a step of reinforcement learning costs here against plain TRL doing the same work, and what injection adds.

`python benchmarks/rl.py [--rounds 8] [--write]`: all arms take turns in one process, a few steps at a time, and CPU
seconds of the one thread are counted, so that a busy machine says the same; a ratio is the median over the rounds. Same
work: one model, one set of prompts, answers that all run into the same cap, two updates a batch, no dynamic sampling, a
learning rate that changes nothing.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment

from fp4rl.inject.attach import attach
from fp4rl.models.load import load
from fp4rl.models.quiet import quiet
from fp4rl.rl.components import arguments
from fp4rl.rl.events import ignore
from fp4rl.rl.generate import Sampling, transformers_sampler
from fp4rl.rl.inputs import start_folder
from fp4rl.rl.rollout import roll_out
from fp4rl.rl.session import ResumeState, Run, TrainingSession
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection

STEPS = 6
RECIPE = {
    "steps": STEPS,
    "train_batch_size": 16,
    "mini_batch_size": 8,
    "rollout_n": 8,
    "lr": 1e-9,
    "filter_groups": {"enable": False},
}
ARMS = {"plain TRL": None, "no injection": "none", "W4A16": "w4a16", "W4A4": "w4a4"}
AIMS = {"no injection": 1.05, "W4A16": 1.15, "W4A4": 1.40}
RESULTS = Path(__file__).parent / "results" / "rl.md"


class Clock(TrainerCallback):
    """Notes when each step (two updates) is over, in CPU seconds."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, *arguments: Any, **_: Any) -> None:
        """One update is done."""
        if arguments[1].global_step % 2 == 0:
            self.at.append(time.process_time())

    def seconds(self) -> float:
        """The median step, the first one left out."""
        return statistics.median(b - a for a, b in zip(self.at, self.at[1:], strict=False))


def experiment(mode: str) -> Experiment:
    """The run of an arm."""
    injection = "none" if mode == "none" else {"mode": mode, "deployment": "compressed_tensors"}
    return Experiment.model_validate({"training": RECIPE, "injection": injection, "evaluation": {"count": 1}})


def prepared(cache: Path, folder: Path) -> Run:
    """The warmed-up model with an end token that it never says: every answer runs into the cap."""
    described = experiment("none")
    model, tokenizer = load(start_folder(described.model, described.task, cache))
    tokenizer.eos_token = tokenizer.bos_token
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Run(described, folder, folder, ignore)


def plain(run: Run, folder: Path) -> Callable[[], float]:
    """TRL as it comes, with the same reward, loss and batch."""
    model, tokenizer = load(run.start)
    by_prompt = {problem.prompt: problem for problem in run.experiment.task.problems("train")}
    recipe = run.experiment.training

    def correct(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        scored = (run.experiment.task.score(by_prompt[p], c) for p, c in zip(prompts, completions, strict=True))
        return [float(score.strict) for score in scored]

    overlong = get_soft_overlong_punishment(recipe.max_response_length, recipe.overlong)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[correct, overlong],
        args=GRPOConfig(**arguments(recipe, folder, 0), loss_type="dapo", epsilon_high=0.28),
        train_dataset=Dataset.from_list([{"prompt": p.prompt} for p in run.experiment.task.problems("train")]),
        processing_class=tokenizer,
    )
    return timed(trainer)


def ours(run: Run, folder: Path, mode: str) -> Callable[[], float]:
    """One of our arms."""
    mine = Run(experiment(mode), folder, run.start, ignore)
    attempt = TrainingSession(mine, ResumeState())
    return timed(attempt.trainer)


def timed(trainer: Any) -> Callable[[], float]:
    """Train once more; seconds a step."""
    clock = Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)

    def go() -> float:
        clock.at.clear()
        trainer._step = 0
        trainer.train()
        return clock.seconds()

    return go


def generation(run: Run, rounds: int) -> tuple[float, float]:
    """(seconds of a generation, ratio of W4A16 to it), two models taking turns."""
    (one, tokenizer), (other, _) = load(run.start), load(run.start)
    sampling = Sampling(48, temperature=1.0, logps=True)
    problems = [problem for problem in run.experiment.task.problems("train")[:16] for _ in range(8)]
    found: dict[str, list[float]] = {"plain": [], "w4a16": []}
    with attach(other, Injection.named("w4a16", deployment="compressed_tensors")) as attachment:
        attachment.set_phase("rollout")
        for turn in range(2 * rounds):
            for name, model in (("plain", one), ("w4a16", other)):
                torch.manual_seed(turn)
                start = time.process_time()
                roll_out(transformers_sampler, model, tokenizer, problems, sampling)
                found[name].append(time.process_time() - start)
    ratios = [b / a for a, b in zip(found["plain"], found["w4a16"], strict=True)]
    return statistics.median(found["plain"]), statistics.median(ratios[1:])


def main() -> None:
    """Run, print, and with --write keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--cache", type=Path, default=Path("runs/models"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        run = prepared(options.cache, root / "start")
        arms = {
            name: plain(run, root / "plain") if mode is None else ours(run, root / mode, mode)
            for name, mode in ARMS.items()
        }
        for go in arms.values():
            go()  # first use of everything
        rounds = [{name: go() for name, go in arms.items()} for _ in range(options.rounds)]
        generated = generation(run, options.rounds)
    text = table(rounds, generated)
    print(text)
    if options.write:
        RESULTS.write_text(text)


def table(rounds: list[dict[str, float]], generated: tuple[float, float]) -> str:
    """The measurements as Markdown."""
    base = statistics.median(r["plain TRL"] for r in rounds)
    lines = [
        "# Cost of a step against plain TRL",
        "",
        "Embedded model (64 wide, 2 layers), 128 answers of 48 tokens a step, 2 updates, one thread; CPU seconds, "
        f"medians of {len(rounds)} rounds of {STEPS} steps, arms in turn in one process. Made by "
        "`benchmarks/rl.py --write`.",
        "",
        "| arm | s/step | against plain TRL | (lowest, highest round) | aim |",
        "|---|---|---|---|---|",
        f"| plain TRL | {base:.3f} | 1 | | |",
    ]
    for name, aim in AIMS.items():
        ratios = sorted(r[name] / r["plain TRL"] for r in rounds)
        seconds = statistics.median(r[name] for r in rounds)
        spread = f"({ratios[0]:.2f}, {ratios[-1]:.2f})"
        lines.append(f"| {name} | {seconds:.3f} | {statistics.median(ratios):.3f} | {spread} | {aim:.2f} |")
    lines += ["", f"Generation alone: {generated[0]:.3f} s; under W4A16 {generated[1]:.3f} times that (aim 1.03).", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
