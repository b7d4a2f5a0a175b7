"""Policies that are not trained: the reference of the KL, and the teacher of a distillation (QAD).

Distillation takes the KL over the whole vocabulary, on the student's own samples:

    forward  KL(teacher || student) = sum_v p_t (log p_t - log p_s)     the student covers all that the teacher may say
    reverse  KL(student || teacher) = sum_v p_s (log p_s - log p_t)     the student stays where the teacher is likely

Teacher and student share one tokenizer. The teacher is never rounded: the same model without injection, or another one.
Logits [tokens, vocabulary] are the largest tensor of a step, so they are computed and dropped chunk by chunk.
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
from fp4rl.rl.sharding import is_sharded, shard
from fp4rl.spec.distillation import Distillation
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection, Phase

Direction = Literal["forward", "reverse"]
Head = Callable[[Tensor], Tensor]

# 1,024 tokens of a vocabulary of 152 k are 0.6 GB of float32 logits for each side.
CHUNK_TOKENS = 1024


def identity(logits: Tensor) -> Tensor:
    """Return logits as they are: the head for callers that have logits already."""
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
    """Compute the KL between teacher and student at each position [answers, tokens], in nats; 0 where `mask` is 0.

    student, teacher [answers, tokens, hidden]: what `heads` (student's, teacher's) turn into logits; with the default
    heads they are the logits. Only the student gets a gradient. Only unmasked tokens are computed, `chunk_tokens` at a
    time, and a chunk's logits are computed again in the backward instead of being kept. `temperature` divides the
    logits of both. Source: arXiv 2306.13649 (on-policy distillation).

    Raises InvalidValueError when the shapes do not fit.
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
    """Compute the KL of each token of a chunk: [n, hidden] -> [n], in float32."""
    student_head, teacher_head = heads
    log_s = log_softmax(student_head(student).float() / t, dim=-1)  # [n, vocabulary]
    with torch.no_grad():
        log_t = log_softmax(teacher_head(teacher).float() / t, dim=-1)
    if log_s.shape != log_t.shape:
        raise InvalidValueError(
            f"student and teacher have vocabularies of {log_s.shape[-1]} and {log_t.shape[-1]} tokens"
        )
    ahead, behind = (log_t, log_s) if direction == "forward" else (log_s, log_t)
    gap = (ahead - behind).masked_fill(ahead == -torch.inf, 0.0)  # a token of probability 0 adds nothing
    return (ahead.exp() * gap).sum(-1)


@dataclass(frozen=True)
class FrozenPolicy:
    """A policy that is not trained: `model` inside `scoring()`; outside, `model` may be the one that is trained."""

    model: PreTrainedModel
    scoring: Callable[[], AbstractContextManager[Any]]

    @property
    def is_copy(self) -> bool:
        """Whether it has weights of its own."""
        return self.scoring is nullcontext


def reference_and_teacher(
    experiment: Experiment, folders: tuple[Path, Path | None], live: PreTrainedModel, phases: Phases
) -> tuple[FrozenPolicy | None, FrozenPolicy | None]:
    """Return the reference and the teacher that the recipe of `experiment` needs.

    `folders`: of the start, which `live` begins with, and of a teacher of its own, if it has one.
    With a fresh LoRA adapter the start is the live model without its adapter, so that no second copy is needed. Without
    an adapter it is a frozen copy, shared by reference and teacher where both are in full precision.
    """
    recipe, lora = experiment.training, experiment.model.lora is not None
    start, of_its_own = folders

    def frozen(folder: Path, injection: Injection | None = None) -> FrozenPolicy:
        how = experiment.model.experts_implementation if folder == start else None
        model, _ = load(folder, experiment.model.dtype, how)
        model.to(next(live.parameters()).device).requires_grad_(False)
        if injection is not None:
            attach(model, injection).set_phase("evaluation")
        if is_sharded(live):
            shard(model)
        return FrozenPolicy(model, nullcontext)

    @cache
    def start_in(precision: str) -> FrozenPolicy:
        injection = experiment.injection if precision == "deployment" else None
        if lora:
            phase: Phase = "reference" if injection is None else "evaluation"
            return FrozenPolicy(live, lambda: _without_adapter(live, phases, phase))
        return frozen(start, injection)

    teacher = None
    if of_its_own is not None:
        teacher = frozen(of_its_own)
    elif recipe.distillation is not None:
        alive = recipe.distillation.teacher == "live"
        teacher = FrozenPolicy(live, phases.reference) if alive else start_in("full")
    return start_in(recipe.reference_precision) if recipe.kl else None, teacher


@contextmanager
def _without_adapter(live: Any, phases: Phases, phase: Phase) -> Iterator[None]:
    with phases.reference(phase), live.disable_adapter():
        yield


def below_adapters(model: Any) -> Any:
    """Return the model that peft has put adapters on; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: Any) -> nn.Module:
    """Return the part of a causal model below its head, adapters or not."""
    inner = below_adapters(model)
    return getattr(inner, inner.base_model_prefix)  # type: ignore[no-any-return]


@dataclass
class Teacher:
    """Distils `frozen` into `student` by the KL over the whole vocabulary, without a second forward of the student."""

    frozen: FrozenPolicy
    student: Any
    spec: Distillation
    temperature: float
    _hidden: Tensor | None = None

    def __post_init__(self) -> None:
        # The trainer's forward returns log-probabilities of sampled tokens alone; the hidden states pass through here.
        backbone(self.student).register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._hidden = output.last_hidden_state

    def kl(self, ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        """Compute the KL at each answer token [rows, T], for the student's last forward of `ids` [rows, P + T]."""
        student = self._hidden
        assert student is not None, "the student has not been run on these tokens"
        with torch.no_grad(), self.frozen.scoring(), dropout_off(self.frozen.model):
            below_head = backbone(self.frozen.model)
            teacher = below_head(**forward_inputs(below_head, ids, attention_mask), use_cache=False)
        self._hidden = None
        tokens = slice(-mask.shape[1] - 1, -1)  # the hidden state before a token predicts it
        return teacher_kl(
            student[:, tokens],
            teacher.last_hidden_state[:, tokens],
            mask,
            self.spec.direction,
            (self.student.get_output_embeddings(), self.frozen.model.get_output_embeddings()),
            temperature=self.temperature,
        )
