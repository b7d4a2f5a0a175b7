"""What the model sees of a problem: `texts` and `token_ids` for training, evaluation, other engines and `fp4rl plan`.

Prompts are never cut: one that is longer than the spec allows is an error before anything is trained.

A cut at the end loses the question, a cut at the beginning the instructions, and the answer would still be scored
against the whole question. verl refuses by default too (`data.truncation: error`).
"""

from collections.abc import Callable, Sequence
from operator import itemgetter

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.task import Chat, Problem


def applies_template(tokenizer: PreTrainedTokenizerBase, chat: Chat | None) -> bool:
    """Return whether a problem is asked by the tokenizer's chat template. Raises InvalidValueError where one must be
    and there is none."""
    if chat is None or tokenizer.chat_template:
        return chat is not None
    if chat.required:
        raise InvalidValueError(
            "task.chat: true, and the model's tokenizer has no chat template; put its chat_template.jinja into the "
            "folder, or write chat: auto for a plain prompt"
        )
    return False


def texts(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> list[str]:
    """Return what the model sees of each problem, before the tokenizer adds a token of its own: the chat template
    applied where there is one, else the plain prompt."""
    return [
        _conversation(tokenizer, problem.chat)
        if problem.chat is not None and applies_template(tokenizer, problem.chat)
        else problem.prompt
        for problem in problems
    ]


def token_ids(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> list[list[int]]:
    """Return the token ids that the model sees of each problem; a template holds its special tokens already."""
    seen, ids = texts(tokenizer, problems), dict[int, list[int]]()
    templated = [applies_template(tokenizer, problem.chat) for problem in problems]
    for whole in set(templated):
        chosen = [index for index, is_whole in enumerate(templated) if is_whole is whole]
        rows = tokenizer([seen[index] for index in chosen], verbose=False, add_special_tokens=not whole)["input_ids"]
        ids |= dict(zip(chosen, rows, strict=True))
    return [ids[index] for index in range(len(problems))]


def _conversation(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    messages = [{"role": role, "content": text} for role, text in chat.messages]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **dict(chat.settings))
        )
    except ImportError:
        raise NotFoundError("a chat template needs jinja2: pip install 'fp4rl[report]', or write chat: false") from None
    except Exception as why:  # what a template raises is its own: Gemma's refuses system messages
        reason = str(why).splitlines()[0]
        raise InvalidValueError(
            f"the tokenizer's chat template cannot show the problem ({reason}); leave out task.system where it takes "
            "none, or write task.chat: false"
        ) from None


def template_adds(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> tuple[str, ...]:
    """Return the parts of a problem's text that are the template's own, in order: its system prompt, turns, tags."""
    if problem.chat is None or not applies_template(tokenizer, problem.chat):
        return ()
    rest, added = texts(tokenizer, [problem])[0], []
    for _, content in problem.chat.messages:
        before, _, rest = rest.partition(content.strip())
        added.append(before)
    return tuple(part for part in (*added, rest) if part)


def require_prompts_fit(
    problems: Sequence[Problem], limit: int, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> None:
    """Raise InvalidValueError, naming the longest, for prompts of more than `limit` tokens."""
    longer = too_long(problems, limit, tokenizer)
    if not longer:
        return
    tokens, problem = max(longer, key=itemgetter(0))
    raise InvalidValueError(
        f"training.max_prompt_length {limit}: {len(longer)} of {len(problems)} prompts are longer, the longest has "
        f"{tokens} tokens ({problem.split} problem {problem.id}, {problem.prompt.strip()[:40]!r}); set "
        f"training.max_prompt_length={tokens}, or take such problems out of the data"
    )


def too_long(
    problems: Sequence[Problem], limit: int, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> list[tuple[int, Problem]]:
    """Return (tokens, problem) of each prompt of more than `limit` tokens.

    The tokenizer is loaded only if a prompt may be too long: except for special ones a token holds at least one byte,
    so that few bytes are few tokens; what a template adds is not known before.
    """
    in_question = [p for p in problems if p.chat is not None or len(p.prompt.encode()) > limit // 2]
    if not in_question:
        return []
    rows = token_ids(tokenizer(), in_question)
    return [(len(row), problem) for row, problem in zip(rows, in_question, strict=True) if len(row) > limit]


def require_positions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: Problem, max_new_tokens: int
) -> None:
    """Raise InvalidValueError where the longest prompt and its answer exceed the model's positions.

    Learned positions end there, and rotary ones were not trained beyond: the answers would be noise.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = len(token_ids(tokenizer, [longest])[0])
    if positions is not None and tokens + max_new_tokens > positions:
        room = positions - tokens
        cure = f"{room} are left for its answer" if room > 0 else "take such problems out of the data"
        raise InvalidValueError(
            f"evaluation.max_new_tokens {max_new_tokens}: the model has {positions} positions, and problem "
            f"{longest.id} takes {tokens}; {cure}"
        )


def encoded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> list[list[int]]:
    """Return the prompts' token ids; InvalidValueError for one that begins twice, has an end or unknown tokens."""
    prompts = token_ids(tokenizer, problems)
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
