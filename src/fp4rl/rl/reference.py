"""Policies that are not trained: the reference that KL is measured against, and the teacher to distil from (QAD).

Distillation takes the KL over the whole vocabulary, on the student's own samples:

    forward  KL(teacher || student) = sum_v p_t (log p_t - log p_s)     covers what the teacher would say
    reverse  KL(student || teacher) = sum_v p_s (log p_s - log p_t)     stays where the teacher is sure

Teacher and student share one tokenizer, and here one architecture: the teacher is the same model without injection.
A table of logits of [tokens, vocabulary] is the largest tensor of a step, so it is made and thrown away chunk by chunk.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fp4rl.inject.attach import attach
from fp4rl.models.load import load
from fp4rl.models.positions import forward_inputs
from fp4rl.rl.generate import dropout_off
from fp4rl.rl.phases import Phases
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Phase
from fp4rl.spec.training import Distillation

Direction = Literal["forward", "reverse"]
Head = Callable[[Tensor], Tensor]

# 1,024 tokens of a 152 k vocabulary are 0.6 GB of float32 logits a side.
CHUNK_TOKENS = 1024


def identity(logits: Tensor) -> Tensor:
    """Return the head for callers who hold logits already."""
    return logits


def teacher_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    direction: Direction = "forward",
    heads: tuple[Head, Head] = (identity, identity),
    *,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """KL between teacher and student at each position [answers, tokens], in nats; 0 where `mask` is 0.

    student, teacher [answers, tokens, hidden]: what `heads` (student's, teacher's) turns into logits; with the default
    heads they are the logits themselves. The gradient reaches the student alone. Only unmasked tokens are computed,
    `chunk_tokens` at a time, and a chunk's logits are made again in the backward instead of being kept.
    `temperature` divides both sides' logits. Sources: arXiv 2306.13649 (on-policy distillation).

    Raises InvalidValueError when the two sides do not line up.
    """
    if student.shape[:2] != teacher.shape[:2] or student.shape[:2] != mask.shape:
        raise InvalidValueError(
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)} and mask {tuple(mask.shape)} "
            "must agree in answers and tokens: score the same tokens with both"
        )
    if chunk_tokens < 1 or temperature <= 0:
        raise InvalidValueError(f"chunk_tokens {chunk_tokens} and temperature {temperature} must be above 0")
    counted = mask.bool()
    ours, theirs = student[counted], teacher[counted]  # [n, hidden]
    parts = [
        checkpoint(_chunk_kl, s, t, heads, direction, temperature, use_reentrant=False, preserve_rng_state=False)
        for s, t in zip(torch.split(ours, chunk_tokens), torch.split(theirs, chunk_tokens), strict=True)
    ]
    kl = torch.zeros(mask.shape, dtype=torch.float32, device=student.device)
    return kl.masked_scatter(counted, torch.cat(parts))


def _chunk_kl(student: Tensor, teacher: Tensor, heads: tuple[Head, Head], direction: Direction, t: float) -> Tensor:
    """KL of each token of a chunk: [n, hidden] -> [n], in float32."""
    student_head, teacher_head = heads
    log_s = log_softmax(student_head(student).float() / t, dim=-1)  # [n, vocabulary]
    with torch.no_grad():
        log_t = log_softmax(teacher_head(teacher).float() / t, dim=-1)
    if log_s.shape != log_t.shape:
        raise InvalidValueError(
            f"student and teacher have vocabularies of {log_s.shape[-1]} and {log_t.shape[-1]} tokens"
        )
    ahead, behind = (log_t, log_s) if direction == "forward" else (log_s, log_t)
    gap = (ahead - behind).masked_fill(ahead == -torch.inf, 0.0)  # a token that both rule out adds nothing
    return (ahead.exp() * gap).sum(-1)


@dataclass(frozen=True)
class FrozenPolicy:
    """`model` inside `scoring()` is the policy that is meant; outside it may be the one that learns."""

    model: PreTrainedModel
    scoring: Callable[[], AbstractContextManager[Any]]

    @property
    def is_copy(self) -> bool:
        """Whether it has weights of its own."""
        return self.scoring is nullcontext


def reference_and_teacher(
    experiment: Experiment, start: Path, live: PreTrainedModel, phases: Phases
) -> tuple[FrozenPolicy | None, FrozenPolicy | None]:
    """Make what the recipe of `experiment` needs beside the live model, which starts from the folder `start`.

    With a fresh LoRA adapter the start is the live model with its adapter off: no second copy of the base is made.
    Without one it is a frozen copy, shared by reference and teacher where both are in full precision.
    """
    recipe, lora = experiment.training, experiment.model.lora is not None

    @cache
    def start_in(precision: str) -> FrozenPolicy:
        injection = experiment.injection if precision == "deployment" else None
        if lora:
            phase: Phase = "reference" if injection is None else "evaluation"
            return FrozenPolicy(live, lambda: _without_adapter(live, phases, phase))
        model, _ = load(start, experiment.model.dtype)
        model.to(next(live.parameters()).device).requires_grad_(False)
        if injection is not None:
            attach(model, injection).set_phase("evaluation")
        return FrozenPolicy(model, nullcontext)

    teacher = None
    if recipe.distillation is not None:
        alive = recipe.distillation.teacher == "live"
        teacher = FrozenPolicy(live, phases.reference) if alive else start_in("full")
    return start_in(recipe.reference_precision) if recipe.kl else None, teacher


@contextmanager
def _without_adapter(live: Any, phases: Phases, phase: Phase) -> Iterator[None]:
    with phases.reference(phase), live.disable_adapter():
        yield


def backbone(model: Any) -> nn.Module:
    """Return the part of a causal model below its head, adapters or not."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix)  # type: ignore[no-any-return]


@dataclass
class Teacher:
    """Distils `frozen` into `student`: their KL over the whole vocabulary, without a second forward of the student."""

    frozen: FrozenPolicy
    student: Any
    spec: Distillation
    temperature: float
    _hidden: Tensor | None = None

    def __post_init__(self) -> None:
        # The trainer's forward gives log-probabilities of the sampled tokens alone; what they were made of passes here.
        backbone(self.student).register_forward_hook(self._keep)

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
