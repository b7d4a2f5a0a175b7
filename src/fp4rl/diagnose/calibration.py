"""The texts that a scan feeds a model, as batches of tokens, with the count and digest that stand in its report."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4rl.spec.mistakes import BadValue, NotThere

ENOUGH_TEXTS = 32


@dataclass(frozen=True)
class Batch:
    """Token ids and attention mask, both [batch, time]; mask 1 is a real token."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Calibration:
    """Batches, and what they are made of: number of texts, of real tokens, and a digest of the tokens in order."""

    batches: tuple[Batch, ...]
    texts: int
    tokens: int
    digest: str

    def described(self) -> dict[str, Any]:
        """What the report says about them."""
        return {"texts": self.texts, "tokens": self.tokens, "digest": self.digest, "few": self.texts < ENOUGH_TEXTS}


def calibrate(tokenizer: Any, texts: Sequence[str], *, batch_size: int = 8, longest: int = 256) -> Calibration:
    """Tokenize `texts`, longest token counts first in a batch cut at `longest`.

    Raises BadValue when there is no text with a token in it, or the tokenizer cannot pad.
    """
    rows = [row[:longest] for text in texts if text.strip() and (row := list(tokenizer(text)["input_ids"]))]
    if not rows:
        raise BadValue("the calibration text is empty; give texts of the task, or --text FILE with some lines")
    if tokenizer.pad_token_id is None:
        raise BadValue("the tokenizer has no pad token; set one, such as tokenizer.pad_token = tokenizer.eos_token")
    return from_tokens(rows, batch_size=batch_size, padding=int(tokenizer.pad_token_id))


def from_tokens(rows: Sequence[Sequence[int]], *, batch_size: int = 8, padding: int = 0) -> Calibration:
    """Batches of rows of token ids, padded on the right, rows of like length together."""
    if not rows or not all(rows):
        raise BadValue("a calibration row has no token; give texts with at least one token each")
    digest = hashlib.sha256(repr([list(row) for row in rows]).encode()).hexdigest()[:12]
    ordered = sorted(rows, key=len)
    batches = [_batch(ordered[i : i + batch_size], padding) for i in range(0, len(ordered), batch_size)]
    return Calibration(tuple(batches), len(rows), sum(len(row) for row in rows), digest)


def texts_of(file: Path) -> list[str]:
    """The lines of a text file; one with fewer than 32 lines is cut into 32 pieces of equally many words instead.

    Raises NotThere for a missing file and BadValue for an empty one.
    """
    if not file.is_file():
        raise NotThere(f"{file}: no such file; give a text file to calibrate on")
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise BadValue(f"{file}: empty; a calibration text needs some lines")
    if len(lines) >= ENOUGH_TEXTS:
        return lines
    words = text.split()
    size = math.ceil(len(words) / ENOUGH_TEXTS)
    return [" ".join(words[i : i + size]) for i in range(0, len(words), size)]


def _batch(rows: Sequence[Sequence[int]], padding: int) -> Batch:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return Batch(ids, (torch.arange(width) < lengths[:, None]).long())
