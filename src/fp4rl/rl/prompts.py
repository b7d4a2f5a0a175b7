"""Prompts are never cut: one that is longer than the spec allows is an error before anything is trained.

A cut at the end loses the question, a cut at the beginning the instructions, and the answer would still be scored
against the whole question. verl refuses by default too (`data.truncation: error`).
"""

from collections.abc import Callable, Sequence
from operator import itemgetter

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.task import Problem


def require_prompts_fit(
    problems: Sequence[Problem], limit: int, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> None:
    """Raise InvalidValueError, naming the longest, for prompts of more than `limit` tokens.

    The tokenizer is loaded only if a prompt may be too long: except for special ones a token holds at least one byte,
    so that few bytes are few tokens.
    """
    in_question = [problem for problem in problems if len(problem.prompt.encode()) > limit // 2]
    if not in_question:
        return
    rows = tokenizer()([problem.prompt for problem in in_question], verbose=False)["input_ids"]
    too_long = [(len(row), problem) for row, problem in zip(rows, in_question, strict=True) if len(row) > limit]
    if not too_long:
        return
    tokens, problem = max(too_long, key=itemgetter(0))
    raise InvalidValueError(
        f"training.max_prompt_length {limit}: {len(too_long)} of {len(problems)} prompts are longer, the longest has "
        f"{tokens} tokens ({problem.split} problem {problem.id}, {problem.prompt.strip()[:40]!r}); set "
        f"training.max_prompt_length={tokens}, or take such problems out of the data"
    )


def require_positions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: Problem, max_new_tokens: int
) -> None:
    """Raise InvalidValueError where the longest prompt and its answer exceed the model's positions.

    Learned positions end there, and rotary ones were not trained beyond: the answers would be noise.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = len(tokenizer(longest.prompt, verbose=False)["input_ids"])
    if positions is not None and tokens + max_new_tokens > positions:
        room = positions - tokens
        cure = f"{room} are left for its answer" if room > 0 else "take such problems out of the data"
        raise InvalidValueError(
            f"evaluation.max_new_tokens {max_new_tokens}: the model has {positions} positions, and problem "
            f"{longest.id} takes {tokens}; {cure}"
        )


def encoded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> list[list[int]]:
    """Return the prompts' token ids; InvalidValueError for one that begins twice, has an end or unknown tokens."""
    texts = [problem.prompt for problem in problems]
    prompts: list[list[int]] = tokenizer(texts)["input_ids"]
    require_prompts_open(problems, prompts, tokenizer)
    rows, largest = int(model.get_input_embeddings().weight.shape[0]), max(map(max, prompts))
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise InvalidValueError(
            f"the prompts hold {token!r}, token {largest} of the tokenizer, but the model's embedding ends at "
            f"{rows - 1}: take it out of task.prompt, or resize the embedding and save the model again"
        )
    return prompts


def padded(sequences: Sequence[list[int]], pad_id: int, *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask of `sequences`, both [sequences, longest]."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    side = "left" if left else "right"
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side), mask


def require_prompts_open(
    problems: Sequence[Problem], rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise InvalidValueError for a prompt that begins twice or has an end; `rows` are the problems' token ids.

    The tokenizer adds its special tokens to a template that was copied with them in it. No model has seen such a text,
    and its answers silently change.
    """
    for problem, ids in zip(problems, rows, strict=True):
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            wrong = f"begins with {tokenizer.bos_token!r} twice"
        elif ids and ids[-1] == tokenizer.eos_token_id:
            wrong = f"ends with {tokenizer.eos_token!r}, before it is answered"
        else:
            continue
        raise InvalidValueError(
            f"the prompt of {problem.split} problem {problem.id} {wrong} ({problem.prompt.strip()[:40]!r}); take that "
            "token out of task.prompt"
        )
