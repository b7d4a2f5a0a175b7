"""What a model sees of a spec's first problem: text and token ids, as training and evaluation feed them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp4rl.cli.terminal import console, print_indented, styled
from fp4rl.lab.matrix import PlannedRun
from fp4rl.models.quiet import quiet
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.words import counted

_FIRST = 48  # token ids on the screen; --json has all


def has_template(folder: Path) -> bool:
    """Return whether a model folder brings a chat template, without loading its tokenizer."""
    if any(
        (folder / name).exists() for name in ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    ):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8", errors="replace")


def prompt_of(experiment: Experiment) -> dict[str, Any]:
    """Return what the model sees of the first training problem, as plain values. Loads the tokenizer."""
    quiet()
    from fp4rl.rl.problems import tokenizer_for
    from fp4rl.rl.prompts import applies_template, template_adds, texts, token_ids

    (problem,) = experiment.task.problems("train", 1)
    tokenizer = tokenizer_for(experiment)
    return {
        "problem_id": problem.id,
        "gold": problem.answer,
        "chat_template": applies_template(tokenizer, problem.chat),
        "template_adds": list(template_adds(tokenizer, problem)),
        "text": texts(tokenizer, [problem])[0],
        "token_ids": token_ids(tokenizer, [problem])[0],
        "stop": list(experiment.evaluation.for_task(experiment.task).stop or ()),
    }


def prompts_of(runs: Sequence[PlannedRun]) -> dict[str, dict[str, Any]]:
    """Return arm -> what its model sees of the first problem; each model and task is looked at once."""
    seen: dict[str, dict[str, Any]] = {}
    for run in runs:
        experiment = run.experiment
        key = f"{experiment.model.path} {experiment.task.model_dump_json()} {experiment.evaluation.stop}"
        if key not in seen:
            seen[key] = {"arms": [], **prompt_of(experiment)}
        if run.arm not in seen[key]["arms"]:
            seen[key]["arms"].append(run.arm)
    return {", ".join(prompt["arms"]): prompt for prompt in seen.values()}


def print_prompts(runs: Sequence[PlannedRun]) -> None:
    """Print what the model sees of problem 1, once for all arms that share it."""
    for arms, prompt in prompts_of(runs).items():
        how = "by the tokenizer's chat template" if prompt["chat_template"] else "plain, no chat template"
        tokens = counted(len(prompt["token_ids"]), "token")
        console().print(styled(("problem 1", "bold"), f" of {arms}: {prompt['problem_id']}, {how}, {tokens}"))
        print_indented(prompt["text"])
        if prompt["template_adds"]:
            print_indented(("the template's own: ", "bold"), " ... ".join(map(repr, prompt["template_adds"])))
        ids, left = prompt["token_ids"], len(prompt["token_ids"]) - _FIRST
        more = f" ... and {left} more (--json has all)" if left > 0 else ""
        print_indented(("token ids: ", "bold"), " ".join(map(str, ids[:_FIRST])) + more)
        print_indented(("gold: ", "bold"), prompt["gold"])
        ends = " or ".join(map(repr, prompt["stop"])) or "the end token alone"
        print_indented(("an evaluation's answer ends at: ", "bold"), ends)
