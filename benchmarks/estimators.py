"""What estimators and transforms cost: a training step of one wide layer and of the embedded model, against identity.

    python benchmarks/estimators.py [--rounds 20] [--write]

All arms take turns, as in `injection.py`. A new arm is one entry in ARMS. `--write` puts the tables into
benchmarks/results/estimators.md.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fp4rl.inject.attach import Attachment, attach
from fp4rl.models.load import embedded_skeleton
from fp4rl.rl.clipping import clipping_figures, masters_of
from fp4rl.rl.oscillation import OscillationWatch, watched_weights
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded
from fp4rl.spec.oscillation import Oscillation
from injection import Arm, in_turn, measure

# What an arm changes of its mode's injection, its `oscillation` and `learned_clipping`, and whether the average of a
# weight decides on its level (`rounds`, of training.ema); all others are compared with the first one.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "identity": {},
    "clipped": {"straight_through": "clipped"},
    "smooth": {"straight_through": "smooth"},
    "smooth, inputs too": {"straight_through": "smooth", "smooth": {"points": ["weight", "input"]}},
    "oscillation": {"oscillation": {}},
    "dampen and freeze": {"oscillation": {"dampen": 1e-3, "freeze": 0.02}},
    "ema.rounds": {"rounds": True},
    "learned clipping": {"learned_clipping": {}},
}
OF_TRAINING = ("oscillation", "learned_clipping")
MODES = ("w4a4", "nvfp4_w4a4")
ALONE = SimpleNamespace(num_processes=1, sync_gradients=True)  # one process, one micro-batch
RESULTS = Path(__file__).parent / "results" / "estimators.md"


class Watching:
    """What `training` adds around the updates of an arm: codes that are followed, weights that are clamped."""

    def __init__(self, harmed: Attachment, training: Mapping[str, Any]) -> None:
        named = training.get("oscillation")
        self.watch = None if named is None else OscillationWatch(harmed, None, Oscillation.model_validate(named))
        described = Experiment.model_validate({"injection": harmed.table.injection, "training": training})
        self.masters = masters_of(harmed.model, harmed, described)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Follow one update."""
        if self.masters is not None:
            self.masters.take_gradients(ALONE)
        if self.watch is not None:
            self.watch.before()
        yield
        if self.masters is not None:
            self.masters.write()
            clipping_figures(self.masters)
        if self.watch is not None:
            self.watch.after()


class EmbeddedArm(Arm):
    """The embedded model with its optimizer."""

    def __init__(self, injection: Injection, training: Mapping[str, Any]) -> None:
        torch.manual_seed(0)
        super().__init__(embedded_skeleton(Embedded()), injection)
        self.watching = Watching(self.harmed, training)
        if self.watching.masters is not None:
            self.watching.masters.put_into(self.optimizer)
        step = self.optimizer.step

        def followed() -> None:
            with self.watching.around():
                step()

        self.optimizer.step = followed


class LayerArm:
    """The widest layer of a 1.5B model; its weight is rounded anew, as after every optimizer step."""

    def __init__(self, injection: Injection, training: Mapping[str, Any]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(1536, 8960, bias=False))
        self.harmed = attach(self.model, injection)
        self.watching = Watching(self.harmed, training)

    def training(self) -> None:
        """Forward and backward of 64 tokens."""
        self.harmed.set_phase("training")
        x = torch.randn(64, 1536, generator=torch.Generator().manual_seed(0)).requires_grad_()
        self.model(x).square().mean().backward()
        with self.watching.around():
            pass
        self.model.zero_grad()


def made(kind: type[EmbeddedArm | LayerArm], mode: str, changes: Mapping[str, Any]) -> EmbeddedArm | LayerArm:
    """Return an arm of ARMS."""
    own = {key: value for key, value in changes.items() if key not in (*OF_TRAINING, "rounds")}
    training = {key: changes[key] for key in OF_TRAINING if key in changes}
    arm = kind(Injection.model_validate({"mode": mode, **own}), training)
    for watched in watched_weights(arm.harmed, None).values() if "rounds" in changes else ():
        watched.state.anchor = watched.weight.detach().clone()
    return arm


def table(what: str, kind: type[EmbeddedArm | LayerArm], rounds: int) -> Iterator[str]:
    """Yield a row for each arm and a column for each mode."""
    first, *others = ARMS
    columns = []
    for mode in MODES:
        arms = {None if name == first else name: made(kind, mode, changes) for name, changes in ARMS.items()}
        columns.append(in_turn(arms, "training", rounds, {}).split(" | "))
    yield f"| {what} | " + " | ".join(MODES) + " |"
    yield "|---" * (len(MODES) + 1) + "|"
    for name, cells in zip((first, *others), zip(*columns, strict=True), strict=True):
        yield f"| {name} | " + " | ".join(cells) + " |"


def layer(rounds: int) -> Iterator[str]:
    """The wide layer."""
    yield from table("nn.Linear(1536, 8960), 64 tokens", LayerArm, rounds)


def embedded(rounds: int) -> Iterator[str]:
    """A training step of the embedded model, its optimizer among it."""
    yield from table("embedded model, 128 x 60 tokens", EmbeddedArm, rounds)


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
