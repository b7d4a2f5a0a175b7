"""Texts that end an answer as an end token does, such as the beginning of a next question that a model asks itself."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

# A token is a byte or more: the last n bytes of an answer stand in its last n tokens. Some more for words' beginnings.
_SPARE = 8


class Stops(StoppingCriteria):  # type: ignore[misc]
    """Ends a row of a generation once its new text, from token `start` on, holds one of the texts in `stop`.

    It reads the text that will be scored, whatever the tokens are that spell it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], start: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, tuple(stop), start
        self._window = max(len(text.encode()) for text in stop) + _SPARE

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        last = input_ids[:, max(self._start, input_ids.shape[1] - self._window) :]
        texts = self._tokenizer.batch_decode(last, skip_special_tokens=True)
        return torch.tensor([_holds(text, self._stop) for text in texts], device=input_ids.device)


class Answer(NamedTuple):
    """`tokens` hold what ended the answer, `text` does not."""

    tokens: list[int]
    text: str
    ended: bool


def cut(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ended: bool, stop: Sequence[str]) -> Answer:
    """An answer up to the first of `stop`; `ended` tells whether an end token stands behind `tokens` otherwise."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    if not _holds(text, stop):
        return Answer(tokens, text, ended)

    def stopped(length: int) -> bool:
        return _holds(str(tokenizer.decode(tokens[:length], skip_special_tokens=True)), stop)

    length = bisect_left(range(len(tokens)), True, key=stopped)
    return Answer(tokens[:length], text[: min(text.find(one) for one in stop if one in text)], True)


def _holds(text: str, stop: Sequence[str]) -> bool:
    return any(one in text for one in stop)
