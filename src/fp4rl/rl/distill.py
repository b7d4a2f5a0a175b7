"""Distillation to the unquantized teacher (QAD): KL over the whole vocabulary, on the student's own samples.

    forward  KL(teacher || student) = sum_v p_t (log p_t - log p_s)     covers what the teacher would say
    reverse  KL(student || teacher) = sum_v p_s (log p_s - log p_t)     stays where the teacher is sure

Teacher and student share one tokenizer, and here one architecture: the teacher is the same model without injection.
A table of logits of [tokens, vocabulary] is the largest tensor of a step, so it is made and thrown away chunk by chunk.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from fp4rl.spec.errors import InvalidValueError

Direction = Literal["forward", "reverse"]
Head = Callable[[Tensor], Tensor]

# 1,024 tokens of a 152 k vocabulary are 0.6 GB of float32 logits a side.
CHUNK_TOKENS = 1024


def identity(logits: Tensor) -> Tensor:
    """The head for callers who hold logits already."""
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
    return _expected_gap(ahead, behind)


def _expected_gap(ahead: Tensor, behind: Tensor) -> Tensor:
    """sum_v exp(ahead) (ahead - behind); a token both rule out (-inf on both sides) adds nothing."""
    gap = (ahead - behind).masked_fill(ahead == -torch.inf, 0.0)
    return (ahead.exp() * gap).sum(-1)
