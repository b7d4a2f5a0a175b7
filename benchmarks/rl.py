"""What a step of reinforcement learning costs here against plain TRL doing the same work, and what injection adds.

    python benchmarks/rl.py [--rounds 8] [--write]      the embedded model on one thread of the CPU
    python benchmarks/rl.py --gpu [--write]             a wider model on the GPU; skipped without CUDA

All arms take turns in one process, a few steps at a time; a ratio is the median over the rounds. On the CPU the seconds
of the one thread are counted, so that a busy machine says the same. Same work: one model, one set of prompts, answers
that all run into the same cap, two updates a batch, no dynamic sampling, a learning rate that changes nothing.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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
from fp4rl.rl import processes
from fp4rl.rl.components import arguments
from fp4rl.rl.events import ignore
from fp4rl.rl.generate import Sampling, transformers_sampler
from fp4rl.rl.inputs import start_folder
from fp4rl.rl.rollout import roll_out
from fp4rl.rl.session import ResumeState, Run, TrainingSession
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection

RECIPE = {
    "train_batch_size": 16,
    "mini_batch_size": 8,
    "rollout_n": 8,
    "lr": 1e-9,
    "filter_groups": {"enable": False},
}
ARMS = {"plain TRL": None, "no injection": "none", "W4A16": "w4a16", "W4A4": "w4a4"}
AIMS = {"no injection": 1.05, "W4A16": 1.15, "W4A4": 1.40}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setting:
    """Where and with which model is measured."""

    name: str
    file: str
    embedded: dict[str, Any]
    steps: int  # a round
    clock: Callable[[], float]


def on_device() -> float:
    """Seconds on the wall, once the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def on_cpu() -> Setting:
    """The embedded model as it comes."""
    name = "Embedded model (64 wide, 2 layers), one thread; CPU seconds"
    return Setting(name, "rl.md", {}, 6, time.process_time)


def on_gpu() -> Setting:
    """A model of 12 layers, not warmed up: no answer ends in any case."""
    card = torch.cuda.get_device_name()
    wide = {"hidden_size": 512, "num_layers": 12, "num_heads": 8, "intermediate_size": 2048}
    name = f"Qwen2-shaped model (512 wide, 12 layers, float32) on one {card}; seconds on the wall"
    file = f"{card.lower().replace(' ', '-')}-rl.md"
    return Setting(name, file, wide | {"warm_up_steps": 0, "initializer_range": 0.02}, 3, on_device)


class Clock(TrainerCallback):
    """Notes when each step (two updates) is over, in seconds of its clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.at = now, list[float]()

    def on_step_end(self, *arguments: Any, **_: Any) -> None:
        """One update is done."""
        if arguments[1].global_step % 2 == 0:
            self.at.append(self.now())

    def seconds(self) -> float:
        """The median step, the first one left out."""
        return statistics.median(b - a for a, b in zip(self.at, self.at[1:], strict=False))


def experiment(mode: str, setting: Setting) -> Experiment:
    """The run of an arm."""
    injection = "none" if mode == "none" else {"mode": mode, "deployment": "compressed_tensors"}
    recipe, model = RECIPE | {"steps": setting.steps}, {"embedded": setting.embedded}
    return Experiment.model_validate(
        {"model": model, "training": recipe, "injection": injection, "evaluation": {"count": 1}}
    )


def prepared(setting: Setting, cache: Path, folder: Path) -> Run:
    """The start model with an end token that it never says: every answer runs into the cap."""
    described = experiment("none", setting)
    model, tokenizer = load(start_folder(described.model, described.task, cache))
    tokenizer.eos_token = tokenizer.bos_token
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Run(described, folder, folder, ignore)


def plain(run: Run, setting: Setting, folder: Path) -> Callable[[], float]:
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
    return timed(trainer, setting)


def ours(run: Run, setting: Setting, folder: Path, mode: str) -> Callable[[], float]:
    """One of our arms."""
    mine = Run(experiment(mode, setting), folder, run.start, ignore)
    attempt = TrainingSession(mine, ResumeState())
    return timed(attempt.trainer, setting)


def timed(trainer: Any, setting: Setting) -> Callable[[], float]:
    """Train once more; seconds a step."""
    clock = Clock(setting.clock)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)

    def go() -> float:
        clock.at.clear()
        trainer._step = 0
        trainer.train()
        return clock.seconds()

    return go


def generation(run: Run, setting: Setting, rounds: int) -> tuple[float, float]:
    """(seconds of a generation, ratio of W4A16 to it), two models taking turns."""
    (one, tokenizer), (other, _) = load(run.start), load(run.start)
    one, other = one.to(processes.device()), other.to(processes.device())
    sampling = Sampling(48, temperature=1.0, logps=True)
    problems = [problem for problem in run.experiment.task.problems("train")[:16] for _ in range(8)]
    found: dict[str, list[float]] = {"plain": [], "w4a16": []}
    with attach(other, Injection.named("w4a16", deployment="compressed_tensors")) as attachment:
        attachment.set_phase("rollout")
        for turn in range(2 * rounds):
            for name, model in (("plain", one), ("w4a16", other)):
                torch.manual_seed(turn)
                start = setting.clock()
                roll_out(transformers_sampler, model, tokenizer, problems, sampling)
                found[name].append(setting.clock() - start)
    ratios = [b / a for a, b in zip(found["plain"], found["w4a16"], strict=True)]
    return statistics.median(found["plain"]), statistics.median(ratios[1:])


def main() -> None:
    """Run, print, and with --write keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--gpu", action="store_true", help="a larger model on the GPU")
    parser.add_argument("--cache", type=Path, default=Path("runs/models"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.gpu and not torch.cuda.is_available():
        print("skipped: the GPU benchmark needs a CUDA device")
        return
    setting = on_gpu() if options.gpu else on_cpu()
    warnings.filterwarnings("ignore")
    quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        run = prepared(setting, options.cache, root / "start")
        arms = {
            name: plain(run, setting, root / "plain") if mode is None else ours(run, setting, root / mode, mode)
            for name, mode in ARMS.items()
        }
        for go in arms.values():
            go()  # first use of everything
        rounds = [{name: go() for name, go in arms.items()} for _ in range(options.rounds)]
        generated = generation(run, setting, options.rounds)
    text = table(setting, rounds, generated)
    print(text)
    if options.write:
        (RESULTS / setting.file).write_text(text)


def table(setting: Setting, rounds: list[dict[str, float]], generated: tuple[float, float]) -> str:
    """The measurements as Markdown."""
    base = statistics.median(r["plain TRL"] for r in rounds)
    lines = [
        "# Cost of a step against plain TRL",
        "",
        f"{setting.name}, medians of {len(rounds)} rounds of {setting.steps} steps, arms in turn in one process. A "
        "step is 128 answers of 48 tokens and 2 updates. Made by `benchmarks/rl.py --write`.",
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
