"""The texts that a scan feeds a model, as batches of tokens, with the count and digest that stand in its report."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4rl.diagnose.texts import ENOUGH_TEXTS
from fp4rl.spec.errors import InvalidValueError


@dataclass(frozen=True)
class Batch:
    """Token ids and masks, all [batch, time]: 1 in `mask` is a real token, 1 in `answers` one that the loss counts."""

    ids: Tensor
    mask: Tensor
    answers: Tensor

    @property
    def predicted(self) -> Tensor:
        """Which positions predict a token that the loss counts [batch, time - 1]."""
        return (self.answers[:, 1:] * self.mask[:, 1:] * self.mask[:, :-1]).bool()


@dataclass(frozen=True)
class Calibration:
    """Batches, and what they are made of: number of texts, of real tokens, and a digest of the tokens in order."""

    batches: tuple[Batch, ...]
    texts: int
    tokens: int
    digest: str

    def described(self) -> dict[str, Any]:
        """Return what the report says about them."""
        return {"texts": self.texts, "tokens": self.tokens, "digest": self.digest, "few": self.texts < ENOUGH_TEXTS}


def calibrate(tokenizer: Any, texts: Sequence[str], *, batch_size: int = 8, longest: int = 256) -> Calibration:
    """Tokenize `texts`, each cut at `longest` tokens; InvalidValueError for no token and for no pad token."""
    rows = [row[:longest] for text in texts if text.strip() and (row := list(tokenizer(text)["input_ids"]))]
    if not rows:
        raise InvalidValueError("the calibration text is empty; give texts of the task, or text=FILE with some lines")
    if tokenizer.pad_token_id is None:
        raise InvalidValueError("the tokenizer has no pad token; set tokenizer.pad_token = tokenizer.eos_token")
    return from_tokens(rows, batch_size=batch_size, padding=int(tokenizer.pad_token_id))


def calibrate_answers(tokenizer: Any, pairs: Sequence[tuple[str, str]], *, batch_size: int = 8) -> Calibration:
    """Prompts with their answers after a blank; the loss counts the answers' tokens alone.

    A policy is never asked to write a prompt, and what it makes of one would drown what it makes of the answer.
    """
    rows = [list(tokenizer(f"{prompt} {answer}")["input_ids"]) for prompt, answer in pairs]
    starts = [len(tokenizer(prompt)["input_ids"]) for prompt, _ in pairs]
    return from_tokens(rows, batch_size=batch_size, padding=int(tokenizer.pad_token_id), starts=starts)


def from_tokens(
    rows: Sequence[Sequence[int]], *, batch_size: int = 8, padding: int = 0, starts: Sequence[int] | None = None
) -> Calibration:
    """Batches of token rows, padded on the right, like lengths together; the loss counts each from its start on."""
    if not rows or not all(rows):
        raise InvalidValueError("a calibration row has no token; give texts with at least one token each")
    digest = hashlib.sha256(repr([list(row) for row in rows]).encode()).hexdigest()[:12]
    ordered = sorted(zip(rows, starts or [0] * len(rows), strict=True), key=lambda pair: len(pair[0]))
    batches = [_batch(ordered[i : i + batch_size], padding) for i in range(0, len(ordered), batch_size)]
    return Calibration(tuple(batches), len(rows), sum(len(row) for row in rows), digest)


def _batch(rows: Sequence[tuple[Sequence[int], int]], padding: int) -> Batch:
    width = max(len(row) for row, _ in rows)
    ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row, _ in rows])
    lengths = torch.tensor([len(row) for row, _ in rows])
    starts = torch.tensor([start for _, start in rows])
    mask = torch.arange(width) < lengths[:, None]
    return Batch(ids, mask.long(), (mask & (torch.arange(width) >= starts[:, None])).long())
