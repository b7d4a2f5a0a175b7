"""What estimators and transforms cost: a training step of one wide layer and of the embedded model, against identity.

    python benchmarks/estimators.py [--rounds 20] [--write]

All arms take turns, as in `injection.py`. A new arm is one entry in ARMS. `--write` puts the tables into
benchmarks/results/estimators.md.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp4rl.inject.attach import attach
from fp4rl.models.load import embedded_skeleton
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded
from injection import TRAINING, Arm, in_turn, measure

# What an arm changes of its mode's injection; the first one is what all others are compared with.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "identity": {},
    "clipped": {"straight_through": "clipped"},
    "smooth": {"straight_through": "smooth"},
    "smooth, inputs too": {"straight_through": "smooth", "smooth": {"points": ["weight", "input"]}},
}
MODES = ("w4a4", "nvfp4_w4a4")
TOKENS = 64
RESULTS = Path(__file__).parent / "results" / "estimators.md"


class Wide(nn.Module):
    """The widest layer of a 1.5B model."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(1536, 8960, bias=False)

    def training_step(self) -> None:
        """Forward and backward of 64 tokens, the weight rounded anew as after every optimizer step."""
        x = torch.randn(TOKENS, 1536, generator=torch.Generator().manual_seed(0)).requires_grad_()
        self.gate_proj(x).float().square().mean().backward()
        self.zero_grad()


class LayerArm:
    """One wide layer under an injection."""

    def __init__(self, injection: Injection) -> None:
        torch.manual_seed(0)
        self.layer = Wide()
        self.harmed = attach(self.layer, injection)

    def training(self) -> None:
        """One step."""
        self.harmed.set_phase("training")
        self.layer.training_step()


def injection_of(mode: str, changes: Mapping[str, Any]) -> Injection | None:
    """Return the injection of an arm; None where it does nothing in this mode."""
    try:
        return Injection.model_validate({"mode": mode, **changes})
    except ValueError:
        return None


def layer(rounds: int) -> Iterator[str]:
    """The wide layer, a row for each mode."""
    yield from table("nn.Linear(1536, 8960), 64 tokens", LayerArm, rounds)


def embedded(rounds: int) -> Iterator[str]:
    """A training step of the embedded model, its optimizer among it, a row for each mode."""
    base = embedded_skeleton(Embedded())
    yield from table(
        "embedded model, 128 x 60 tokens",
        lambda injection: Arm(copy.deepcopy(base), injection, TRAINING),
        rounds,
    )


def table(what: str, made: Any, rounds: int) -> Iterator[str]:
    """Yield rows of `made` arms, the modes one below the other."""
    first, *others = ARMS
    yield f"| {what} | {first} | " + " | ".join(others) + " |"
    yield "|---" * (len(ARMS) + 1) + "|"
    for mode in MODES:
        injections = {name: injection_of(mode, changes) for name, changes in ARMS.items()}
        arms = {None if name == first else name: made(i) for name, i in injections.items() if i is not None}
        cells = dict(
            zip((name or first for name in arms), in_turn(arms, "training", rounds, {}).split(" | "), strict=True)
        )
        yield f"| {mode} | " + " | ".join(cells.get(name, "does nothing") for name in ARMS) + " |"


HEAD = (
    "# What estimators cost",
    "",
    "One thread, CPU seconds, medians of {rounds} rounds with all arms in turn; ratios are against `identity`, in"
    " brackets their middle half. A training step is forward and backward in float32, of the embedded model with its"
    " optimizer; the layer's weight is rounded anew in every step. What each arm is:"
    " [estimators](../../docs/concepts/estimators.md). Made by `benchmarks/estimators.py --write`.",
)


if __name__ == "__main__":
    measure(HEAD, (layer, embedded), 20, RESULTS)
