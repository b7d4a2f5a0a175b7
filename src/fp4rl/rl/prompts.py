"""Prompts are never cut: one that is longer than the spec allows is named before anything is trained.

A cut at the end takes the question away, a cut at the beginning the instructions; and an answer to what is left would
be trained on under the whole question's number. verl refuses by default too (`data.truncation: error`).
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from fp4rl.spec.mistakes import BadValue
from fp4rl.tasks.task import Problem


def require_prompts_fit(
    problems: Sequence[Problem], limit: int, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> None:
    """Raise BadValue, naming the longest, for prompts of more than `limit` tokens.

    The tokenizer is asked for when a prompt is in question at all: tokens stand for a byte or more each, bar special
    ones, so that few bytes are few tokens.
    """
    in_question = [problem for problem in problems if len(problem.prompt.encode()) > limit // 2]
    if not in_question:
        return
    rows = tokenizer()([problem.prompt for problem in in_question], verbose=False)["input_ids"]
    too_long = [len(row) for row in rows if len(row) > limit]
    if not too_long:
        return
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    one = in_question[longest]
    raise BadValue(
        f"training.max_prompt_length {limit}: {len(too_long)} of {len(problems)} prompts are longer, the longest has "
        f"{max(too_long)} tokens ({one.split} problem {one.id}, {one.prompt.strip()[:40]!r}); set "
        f"training.max_prompt_length={max(too_long)}, or take such problems out of the data"
    )
