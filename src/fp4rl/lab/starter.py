"""A first suite, commented, for a model folder and a table: its limits are measured with the model's own tokenizer."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fp4rl.models.load import tokenizer_of
from fp4rl.rl.prompts import token_ids
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.task import SPLITS, Split, Task
from fp4rl.tasks.scorers import SCORERS
from fp4rl.tasks.table import Table, default_prompt

_ROUND = 64  # tokens that limits are rounded up to
_LEAST, _MOST = 256, 2048  # tokens of an answer
# dtype of the model -> the name of the arm that rounds nothing
_PLAIN = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_TEXT = """# {name}: made by `fp4rl new`. Every key: `fp4rl keys`; what it would run: `fp4rl plan {file}`.
suite: {name}
seeds: [0, 1, 2]          # each arm is trained with each: the intervals of the report are over them
base:
  model:
    path: {model}
    dtype: {dtype}
  task:                   # what the model sees of it: `fp4rl plan {file} --show-prompt`; checked by `fp4rl data {file}`
{task}
  training:
    algorithm: dapo       # grpo, gspo, dr_grpo and more: `fp4rl keys training.algorithm`
    steps: {steps}             # batches of rollouts
    train_batch_size: {batch}  # of {train} training problems, with rollout_n answers each
    mini_batch_size: {half}
    rollout_n: 8
    micro_batch_size: 8   # answers a backward pass; raise it where memory allows
    lr: 1.0e-6
    max_prompt_length: {prompt}    # the longest prompt has {longest} tokens
    max_response_length: {answer}  # the longest solution of the file has {solution} tokens; cut answers count as wrong
  evaluation:
    count: {test}            # problems of the test split, which is never trained on
    batch_size: 64
    injections:
      quantized: {served}
arms:
  {plain}:                   # nothing is rounded in training; judged as it is, and quantized afterwards
    evaluation: {{profiles: [full, quantized]}}
  w4a8:                   # MXFP4 weights and MXFP8 inputs, in training as where it is served
    evaluation: {{profiles: [full, deployment]}}
    injection: {served}
comparisons:
  - question: Does training under W4A8 beat quantizing afterwards?
    treatment: w4a8@deployment
    control: {plain}@quantized
    factors: [injection, evaluation.profiles]
"""


@dataclass(frozen=True)
class Starter:
    """The text of a suite, and what was measured for it."""

    text: str
    sizes: dict[Split, int]
    has_template: bool


def starter(name: str, model: Path, task_keys: dict[str, Any], steps: int = 20) -> Starter:
    """Write a suite for a model folder and the keys of a task.

    Raises what the task raises of its file, and InvalidValueError for too few problems or positions.
    """
    tokenizer = tokenizer_of(model)
    task_keys = _task_keys(task_keys, bool(tokenizer.chat_template))
    task = Table(**task_keys)
    sizes = {split: len(task.problems(split)) for split in SPLITS}
    if sizes["train"] < 2 or not sizes["test"]:
        raise InvalidValueError(
            f"{task_keys['path']}: {sizes['train']} training and {sizes['test']} test problems are too few; give more "
            "rows, or a test file with --test-path"
        )
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= config.get("text_config") or {}
    longest, solution = _lengths(task, tokenizer)
    prompt = _rounded(longest)
    answer = min(max(_rounded(2 * solution), _LEAST), _MOST)
    if (positions := config.get("max_position_embeddings")) is not None:
        answer = min(answer, positions - prompt)
        if answer < 1:
            raise InvalidValueError(f"{model}: {positions} positions leave no room behind prompts of {longest} tokens")
    batch = next(size for size in (16, 8, 4, 2) if size <= sizes["train"])
    stated = str(config.get("dtype") or config.get("torch_dtype"))
    dtype = stated if stated in _PLAIN else "float32"
    text = _TEXT.format(
        name=name,
        file=f"{name}.yaml",
        model=_scalar(str(model)),
        dtype=dtype,
        task=_as_yaml(task_keys),
        steps=steps,
        batch=batch,
        half=max(batch // 2, 1),
        prompt=prompt,
        answer=answer,
        longest=longest,
        solution=solution,
        train=sizes["train"],
        test=min(sizes["test"], 500),
        plain=_PLAIN[dtype],
        # in the folder's dtype: a packer rounds the folder's own values
        served=f"{{mode: w4a8, deployment: vllm_ascend, dtype: {dtype}}}",
    )
    return Starter(text, sizes, bool(tokenizer.chat_template))


def _lengths(task: Task, tokenizer: Any) -> tuple[int, int]:
    problems = [problem for split in SPLITS for problem in task.problems(split)]
    solutions = tokenizer([problem.solution for problem in problems], verbose=False)["input_ids"]
    return max(map(len, token_ids(tokenizer, problems))), max(map(len, solutions))


def _rounded(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND


def _scalar(value: Any) -> str:
    """Return a value as YAML: a plain word bare, anything else as JSON, which YAML is too."""
    if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


_NOTES = {
    "question": "its column, guessed",
    "answer": "its column, guessed",
    "choices": "its columns, guessed",
    "scorer": f"how answers are compared: {', '.join(SCORERS)}",
    "prompt": "what is asked",
    "chat": "by the model's chat template, where it has one; false: never",
}


def _task_keys(given: dict[str, Any], has_template: bool) -> dict[str, Any]:
    """Return the keys of the task with the prompt written out; a file of whole messages has its own."""
    keys = {**given, "chat": "auto"}
    if "question" in keys:
        asks = SCORERS[keys["scorer"]].asks
        keys["prompt"] = f"{{question}} {asks}" if has_template else default_prompt(keys["scorer"])
    return keys


def _as_yaml(keys: dict[str, Any]) -> str:
    lines = (f"{key}: {_scalar(value)}{f'  # {_NOTES[key]}' if key in _NOTES else ''}" for key, value in keys.items())
    return "\n".join(f"    {line}" for line in lines)
