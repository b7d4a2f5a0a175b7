"""The texts that a scan runs through a model, as batches of tokens, with counts and a digest for its report."""

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
    """Token ids and masks [batch, time]: `mask` is 0 for padding, `answers` is 1 for tokens that the loss counts."""

    ids: Tensor
    mask: Tensor
    answers: Tensor

    @property
    def predicted(self) -> Tensor:
        """A mask [batch, time - 1] of the positions that predict a token that the loss counts."""
        return (self.answers[:, 1:] * self.mask[:, 1:] * self.mask[:, :-1]).bool()


@dataclass(frozen=True)
class Calibration:
    """Batches, with the number of their texts and tokens, and a digest of the tokens in order."""

    batches: tuple[Batch, ...]
    texts: int
    tokens: int
    digest: str

    def described(self) -> dict[str, Any]:
        """Return counts and digest for the report."""
        return {"texts": self.texts, "tokens": self.tokens, "digest": self.digest, "few": self.texts < ENOUGH_TEXTS}


def calibrate(tokenizer: Any, texts: Sequence[str], *, batch_size: int = 8, longest: int = 256) -> Calibration:
    """Tokenize `texts`, each cut at `longest` tokens. Raises InvalidValueError without any token, or any pad token."""
    rows = [row[:longest] for text in texts if text.strip() and (row := list(tokenizer(text)["input_ids"]))]
    if not rows:
        raise InvalidValueError("the calibration text is empty; give texts of the task, or text=FILE with some lines")
    if tokenizer.pad_token_id is None:
        raise InvalidValueError("the tokenizer has no pad token; set tokenizer.pad_token = tokenizer.eos_token")
    return from_tokens(rows, batch_size=batch_size, padding=int(tokenizer.pad_token_id))


def calibrate_answers(tokenizer: Any, pairs: Sequence[tuple[str, str]], *, batch_size: int = 8) -> Calibration:
    """Tokenize pairs of prompt and answer, joined by a blank; the loss counts the tokens of answers alone.

    A policy never writes prompts, and its loss on prompts would dominate its loss on answers.
    """
    rows = [list(tokenizer(f"{prompt} {answer}")["input_ids"]) for prompt, answer in pairs]
    starts = [len(tokenizer(prompt)["input_ids"]) for prompt, _ in pairs]
    return from_tokens(rows, batch_size=batch_size, padding=int(tokenizer.pad_token_id), starts=starts)


def from_tokens(
    rows: Sequence[Sequence[int]], *, batch_size: int = 8, padding: int = 0, starts: Sequence[int] | None = None
) -> Calibration:
    """Make batches of rows of tokens, padded on the right, similar lengths together; loss counts from `starts` on."""
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
