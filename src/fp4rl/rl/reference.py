"""Policies that are not trained: the reference that KL is measured against, and the teacher to distil from."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fp4rl.inject.attach import attach
from fp4rl.models.load import load
from fp4rl.models.positions import forward_inputs
from fp4rl.rl.distill import teacher_kl
from fp4rl.rl.phases import Phases
from fp4rl.rl.scoring import dropout_off
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection, Phase
from fp4rl.spec.training import Distillation


@dataclass(frozen=True)
class FrozenPolicy:
    """`model` inside `scoring()` is the policy that is meant; outside it may be the one that learns."""

    model: PreTrainedModel
    scoring: Callable[[], AbstractContextManager[Any]]

    @property
    def is_copy(self) -> bool:
        """Whether it has weights of its own."""
        return self.scoring is nullcontext


@dataclass(frozen=True)
class ReferencePolicies:
    """The policies that a recipe holds the live one against; None where it needs none."""

    reference: FrozenPolicy | None
    teacher: FrozenPolicy | None


def reference_policies(experiment: Experiment, start: Path, live: PreTrainedModel, phases: Phases) -> ReferencePolicies:
    """Make what the recipe of `experiment` needs beside the live model, which starts from the folder `start`.

    With a fresh LoRA adapter the start is the live model with its adapter off: no second copy of the base is made.
    Without one it is a frozen copy, shared by reference and teacher where both are in full precision.
    """
    recipe, loaded = experiment.training, dict[str, FrozenPolicy]()

    def start_in(precision: str) -> FrozenPolicy:
        if precision not in loaded:
            loaded[precision] = _start(experiment, start, live, phases, quantized=precision == "deployment")
        return loaded[precision]

    teacher = None
    if recipe.distillation is not None:
        alive = recipe.distillation.teacher == "live"
        teacher = FrozenPolicy(live, phases.reference) if alive else start_in("full")
    return ReferencePolicies(start_in(recipe.reference_precision) if recipe.kl else None, teacher)


def _start(
    experiment: Experiment, start: Path, live: PreTrainedModel, phases: Phases, *, quantized: bool
) -> FrozenPolicy:
    quantized = quantized and experiment.injection is not None
    if experiment.model.lora is not None:
        return FrozenPolicy(live, lambda: _without_adapter(live, phases, "evaluation" if quantized else "reference"))
    return _copy(start, experiment, next(live.parameters()).device, experiment.injection if quantized else None)


def _copy(start: Path, experiment: Experiment, device: torch.device, injection: Injection | None) -> FrozenPolicy:
    model, _ = load(start, experiment.model.dtype)
    model.to(device).requires_grad_(False)
    if injection is not None:
        attach(model, injection).set_phase("evaluation")
    return FrozenPolicy(model, nullcontext)


@contextmanager
def _without_adapter(live: Any, phases: Phases, phase: Phase) -> Iterator[None]:
    with phases.reference(phase), live.disable_adapter():
        yield


def backbone(model: Any) -> nn.Module:
    """The part of a causal model below its head, adapters or not."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix)  # type: ignore[no-any-return]


class Teacher:
    """Distils `frozen` into `student`: their KL over the whole vocabulary, without a second forward of the student."""

    def __init__(self, frozen: FrozenPolicy, student: Any, spec: Distillation, temperature: float) -> None:
        self.frozen = frozen
        self.student = student
        self.spec = spec
        self.temperature = temperature
        self._hidden: Tensor | None = None
        # The trainer's forward gives log-probabilities of the sampled tokens alone; what they were made of passes here.
        backbone(student).register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._hidden = output.last_hidden_state

    def kl(self, ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        """KL at each token of the answers [rows, T], for the student's last forward of `ids` [rows, P + T]."""
        student = self._hidden
        assert student is not None, "the student has not been run on these tokens"
        with torch.no_grad(), self.frozen.scoring(), dropout_off(self.frozen.model):
            below_head = backbone(self.frozen.model)
            teacher = below_head(**forward_inputs(below_head, ids, attention_mask), use_cache=False)
        self._hidden = None
        tokens = slice(-mask.shape[1] - 1, -1)  # the state before a token is what predicts it
        return teacher_kl(
            student[:, tokens],
            teacher.last_hidden_state[:, tokens],
            mask,
            self.spec.direction,
            (self.student.get_output_embeddings(), self.frozen.model.get_output_embeddings()),
            temperature=self.temperature,
        )
