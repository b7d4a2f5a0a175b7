"""The problems of a task as verl reads them, and the chat template under which it sees fp4rl's own prompts.

verl renders messages by the tokenizer's chat template. Here a message's text is the whole prompt, and the template
writes it as it is, behind what the tokenizer itself puts before a text: both train on the same tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.task import Problem

AS_WRITTEN = "{% for message in messages %}{{ message.content }}{% endfor %}"


def chat_template(folder: Path, problems: Sequence[Problem] = ()) -> str:
    """Return the template that gives a prompt's own tokens for the tokenizer in `folder`.

    Raises InvalidValueError, naming the first of `problems`, where verl would see other tokens all the same.
    """
    from fp4rl.models.load import load_tokenizer
    from fp4rl.rl.prompts import applies_template, token_ids

    tokenizer = load_tokenizer(folder)
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    before = len(whole) - len(bare) if whole[-len(bare) :] == bare else 0
    if any(applies_template(tokenizer, problem.chat) for problem in problems):
        before = 0  # the prompts of `as_seen` are whole: the model's own chat template has put it there
    template = str(tokenizer.decode(whole[:before])) + AS_WRITTEN
    render = partial(tokenizer.apply_chat_template, chat_template=template, tokenize=True, return_dict=False)
    for problem in problems:
        if render(_messages(problem), add_generation_prompt=True) != token_ids(tokenizer, [problem])[0]:
            raise InvalidValueError(
                f"{folder}: its tokenizer reads the prompt of {problem.split} problem {problem.id} otherwise through a "
                "chat template, as verl does; take a model whose tokenizer adds special tokens only before a text"
            )
    return template


def as_seen(experiment: Experiment, problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """Return the problems with what the model sees as their prompts: its chat template applied where the task asks."""
    from fp4rl.rl.problems import tokenizer_for
    from fp4rl.rl.prompts import texts

    seen = texts(tokenizer_for(experiment), problems)
    return tuple(replace(problem, prompt=text) for problem, text in zip(problems, seen, strict=True))


def splits(experiment: Experiment) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """Return the problems to train on, and those that verl validates on.

    Raises InvalidValueError for prompts that are too long, and for fewer problems than a step takes.
    """
    from fp4rl.models.load import load_tokenizer
    from fp4rl.rl.problems import problems_of
    from fp4rl.rl.prompts import require_prompts_fit

    task, recipe, evaluation = experiment.task, experiment.training, experiment.evaluation
    learned = problems_of(experiment, "train")
    judged = problems_of(experiment, evaluation.split, evaluation.count)
    if len(learned) < recipe.train_batch_size:
        raise InvalidValueError(
            f"training.train_batch_size {recipe.train_batch_size}: {task.name} has {len(learned)} problems to train "
            "on, and verl takes a step from different ones; lower it"
        )
    folder = Path(experiment.model.path or "")
    require_prompts_fit((*learned, *judged), recipe.max_prompt_length, lambda: load_tokenizer(folder))
    return as_seen(experiment, learned), as_seen(experiment, judged)


def write(problems: Sequence[Problem], source: str, file: Path) -> None:
    """Write problems as a Parquet file with verl's columns; `extra_info` holds what fp4rl's reward asks for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([_row(problem, source, n) for n, problem in enumerate(problems)]), file)


def _messages(problem: Problem) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.prompt}]


def _row(problem: Problem, source: str, index: int) -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": _messages(problem),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"index": index, "id": problem.id, "split": problem.split, "prompt": problem.prompt},
    }
