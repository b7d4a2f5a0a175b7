"""What injection costs: a generated token, a training step, a call of one layer, and bytes of memory.

    python benchmarks/injection.py [--rounds 40] [--write]

A plain model and its injected twins take turns, and CPU seconds of one thread are counted, so that a busy machine says
the same; a ratio is the median over the rounds. `--write` puts the tables into benchmarks/results/injection.md.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fp4rl.inject.attach import Attachment, attach
from fp4rl.models.load import embedded_skeleton
from fp4rl.spec.injection import PHASES, Injection
from fp4rl.spec.model import Embedded

MODES = ("w4a16", "w4a4", "w4a8", "nvfp4_w4a16", "nvfp4_w4a4")
AIMS = {("generation", "w4a16"): 1.03, ("training", "w4a16"): 1.15, ("training", "w4a4"): 1.40}
PROMPTS = torch.randint(5, 45, (128, 20), generator=torch.Generator().manual_seed(0))
TRAINING = torch.randint(5, 45, (128, 60), generator=torch.Generator().manual_seed(1))
RESULTS = Path(__file__).parent / "results" / "injection.md"
ROUNDS_BEFORE = 2  # the first rounds fill caches and take the first looks of the evidence


class Arm:
    """One model with its optimizer, injected or not, and the tokens of a training step."""

    def __init__(
        self, model: PreTrainedModel, injection: Injection | str | None, tokens: torch.Tensor = TRAINING
    ) -> None:
        self.model, self.tokens = model, tokens
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
        injection = Injection.named(injection) if isinstance(injection, str) else injection
        self.harmed: Attachment | None = attach(model, injection) if injection is not None else None

    def generation(self) -> None:
        """128 answers of 40 tokens, with a cache."""
        self._enter("rollout")
        self.model.eval()
        with torch.no_grad():
            self.model.generate(PROMPTS, max_new_tokens=40, min_new_tokens=40, do_sample=False, use_cache=True)

    def training(self) -> None:
        """Forward, backward and an optimizer step over all tokens."""
        self._enter("training")
        self.model.train()
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _enter(self, phase: Any) -> None:
        if self.harmed is not None:
            self.harmed.set_phase(phase)  # as a run does: every rollout begins without rounded copies


def seconds(deed: Callable[[], Any]) -> float:
    start = time.process_time()
    deed()
    return time.process_time() - start


def embedded(rounds: int) -> Iterator[str]:
    """Generation and training of the embedded model, all arms in turn."""
    base = embedded_skeleton(Embedded())
    arms = {mode: Arm(copy.deepcopy(base), mode) for mode in (None, *MODES)}
    yield "| | plain | " + " | ".join(MODES) + " |"
    yield "|---" * (len(MODES) + 2) + "|"
    for deed in ("generation", "training"):
        yield f"| {deed} | {in_turn(arms, deed, rounds, AIMS)} |"


def in_turn(arms: Mapping[str | None, Arm], deed: str, rounds: int, aims: Mapping[tuple[str, str], float]) -> str:
    """Measure a deed of all arms in turn; return cells: the time of the plain one, and ratios of the others to it."""
    taken: dict[str | None, list[float]] = {mode: [] for mode in arms}
    for turn in range(rounds + ROUNDS_BEFORE):
        for mode, arm in arms.items():
            spent = seconds(getattr(arm, deed))
            taken[mode] += [spent] * (turn >= ROUNDS_BEFORE)
    plain = taken.pop(None)
    cells = [f"{1000 * statistics.median(plain):.0f} ms"]
    for mode, own in taken.items():
        low, ratio, high = statistics.quantiles((a / b for a, b in zip(own, plain, strict=True)), n=4)
        aim = aims.get((deed, str(mode)))
        cells.append(f"{ratio:.3f} ({low:.2f}-{high:.2f})" + (f", aim {aim:.2f}" if aim else ""))
    return " | ".join(cells)


def one_call(rounds: int) -> Iterator[str]:
    """Microseconds that a call of one 64 x 64 layer takes more than without injection, the least of a few blocks."""
    layer, x = nn.Linear(64, 64), torch.randn(128, 1, 64)
    yield "| a call of nn.Linear(64, 64) on 128 tokens | plain | w4a16 | w4a4 |"
    yield "|---|---|---|---|"
    for phase, grad in (("rollout", False), ("training", True)):
        with torch.set_grad_enabled(grad):
            plain = microseconds(lambda: layer(x), rounds)
            more = []
            for mode in ("w4a16", "w4a4"):
                with attach(layer, Injection.named(mode)) as harmed:
                    harmed.set_phase(phase)
                    more.append(microseconds(lambda: layer(x), rounds) - plain)
        yield f"| {phase} | {plain:.1f} us | {more[0]:+.1f} us | {more[1]:+.1f} us |"


def microseconds(deed: Callable[[], Any], rounds: int, calls: int = 1000) -> float:
    def block() -> None:
        for _ in range(calls):
            deed()

    block()
    return min(seconds(block) for _ in range(max(3, rounds // 3))) / calls * 1e6


def large(rounds: int) -> Iterator[str]:
    """The widest layer of a 1.5B model: what is paid once per optimizer step, and what is held."""
    always = {"apply_during": {"weight": PHASES}}
    injections = {
        "plain": None,
        "rounded copy (trained weight)": Injection.named("w4a16"),
        "rounded copy (frozen weight)": Injection.named("w4a16"),
        "packed (frozen weight)": Injection.model_validate({"mode": "w4a16", "frozen_base": "packed", **always}),
    }
    yield "| nn.Linear(1536, 8960) in bfloat16 | bits held per weight | first call after invalidate() | next call |"
    yield "|---|---|---|---|"
    x = torch.randn(64, 1536, dtype=torch.bfloat16)
    for name, injection in injections.items():
        layer = nn.Linear(1536, 8960, bias=False, dtype=torch.bfloat16).requires_grad_("trained" in name)
        with torch.no_grad(), attached(layer, injection) as harmed:
            first, after = [], []
            for _ in range(max(3, rounds // 3)):
                if harmed is not None:
                    harmed.invalidate()
                first.append(seconds(partial(layer, x)))
                after.append(seconds(partial(layer, x)))
            bits = 8 * held(layer) / (1536 * 8960)
        cost = f"{1000 * statistics.median(first):.1f} ms | {1000 * statistics.median(after):.1f} ms"
        yield f"| {name} | {bits:.2f} | {cost} |"


@contextmanager
def attached(layer: nn.Module, injection: Injection | None) -> Iterator[Attachment | None]:
    if injection is None:
        yield None
        return
    with attach(layer, injection) as harmed:
        yield harmed


def held(layer: nn.Module) -> int:
    """Bytes of the weight, of its rounded copy and of its codes, whichever there are."""
    state = layer.__dict__.get("injected")
    kept = getattr(getattr(state, "cache", None), "copy", None)
    tensors = [p for p in layer.parameters() if not p.is_meta] + ([kept] if kept is not None else [])
    tensors += getattr(state, "tensors", [])
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(head: Sequence[str], parts: Sequence[Callable[[int], Iterator[str]]], rounds: int, results: Path) -> None:
    """Measure what the command line says, print each line of the `parts` as it comes, and write all on request.

    `head` may name the `{rounds}`.
    """
    parser = argparse.ArgumentParser(description=head[0].removeprefix("# "))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [line.format(rounds=asked.rounds) for line in head]
    for part in parts:
        lines.append("")
        for line in part(asked.rounds):
            lines.append(line)
            print(line, flush=True)
    if asked.write:
        results.write_text("\n".join(lines) + "\n", encoding="utf-8")


HEAD = (
    "# What injection costs",
    "",
    "One thread, CPU seconds, medians of {rounds} rounds with all arms in turn; ratios are against the plain"
    " model, in brackets their middle half. Embedded model (64 wide, 2 layers, float32), 128 sequences; the wide"
    " layer sees 64 tokens. Made by `benchmarks/injection.py --write`.",
)


if __name__ == "__main__":
    measure(HEAD, (embedded, one_call, large), 40, RESULTS)
