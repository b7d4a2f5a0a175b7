"""Greedy answers to the run's own problems: those of the checkpoint against those of the policy, one by one."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fp4rl.engines.checkpoints.source import Source
from fp4rl.engines.checkpoints.verify.against import Against
from fp4rl.engines.checkpoints.verify.checkpoint import Checkpoint
from fp4rl.engines.checkpoints.verify.findings import Check
from fp4rl.engines.checkpoints.verify.loaded import Loaded, compare_logits, evaluating, inputs_alone, loaded
from fp4rl.engines.checkpoints.verify.trained import Trained
from fp4rl.engines.checkpoints.verify.weights import Said
from fp4rl.models.load import base_of, load, load_tokenizer
from fp4rl.rl.answered import Item
from fp4rl.rl.evaluate import EvaluationRunner, answer, evaluation_runner, items_digest
from fp4rl.spec.errors import UserError
from fp4rl.spec.evidence import Evaluation
from fp4rl.spec.injection import Injection

_SHOWN = 40  # characters of an answer


def computed(checkpoint: Checkpoint, trained: Trained, meant: Against, said: Said, *, reordered: int) -> Check:
    """Load the checkpoint, and compare its logits with the policy's and its answers to the run's own problems.

    `reordered` is the number of values that the layout's order of products gives other last bits.
    """
    check = Check("transformers")
    try:
        tokenizer = load_tokenizer(checkpoint.folder)
        engine = loaded(checkpoint, trained, meant.dtype, check)
    except UserError as error:
        check.count(models=1)
        check.differs("the folder", f"cannot be loaded: {error}", models=1)
        return check
    if engine is None:
        return check
    if reordered:
        engine = replace(engine, otherwise=f"{reordered:,} values of weights have other last bits")
    policy, injection = policy_in(engine.dtype, trained, meant)
    compare_logits(check, engine, policy, injection)
    try:
        runner = None if meant.experiment is None else evaluation_runner(meant.experiment)
    except UserError as error:
        check.notes.append(f"no answers were compared: {error}")
        return check
    if runner is None:
        check.notes.append("a model folder has no task, so no answers were compared; --against a run compares them")
        return check
    with engine.computing():
        here = _answers(engine.model, tokenizer, runner, partial(said, "answers of the checkpoint"))
    with evaluating(policy, injection):
        expected = _answers(policy, tokenizer, runner, partial(said, "answers of the policy"))
    _problem_by_problem(check, here, expected, engine)
    shares = [sum(item.strict for item in items) / len(items) for items in (here, expected)]
    check.notes.append(_accuracy(engine, meant, shares, _recorded(meant, trained, runner)))
    return check


def policy_in(dtype: str, trained: Trained, meant: Against) -> tuple[Any, Injection | None]:
    """Return the policy in the dtype that an engine computes in, and what is injected there.

    In another dtype than its own, its weights are those that were rounded, cast: to round the cast ones would give
    others, where the injection rounds FP32 masters or a sum with adapters.
    """
    if dtype == meant.dtype:
        return trained.model, trained.injection
    if base_of(meant.folder) is not None and trained.injection.lora != "merged":
        return load(meant.folder, dtype, meant.experts)[0], trained.injection
    model: Any = load(base_of(meant.folder) or meant.folder, dtype, meant.experts)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(trained.computed[name])
    return model, inputs_alone(trained.injection)


def _recorded(meant: Against, trained: Trained, runner: EvaluationRunner) -> Evaluation | None:
    """Return the run's own evaluation of these sites on these problems, greedily; None where there is none."""
    judged = Source(meant.folder, meant.injection, meant.run).judged(trained.table)
    items = items_digest(runner.problems)
    same = [e for e in judged if e.profile.items_digest == items and runner.spec.samples == 1]
    return same[-1] if same else None


def _answers(model: Any, tokenizer: Any, runner: EvaluationRunner, said: Any) -> tuple[Item, ...]:
    spec = runner.spec.model_copy(update={"samples": 1})
    return answer(model, tokenizer, runner.problems, runner.task.score, spec, said)


def _problem_by_problem(check: Check, here: Sequence[Item], expected: Sequence[Item], engine: Loaded) -> None:
    pairs = [
        (a, b) for a, b in zip(here, expected, strict=True) if (a.completion, a.length) != (b.completion, b.length)
    ]
    if engine.otherwise is not None:
        check.notes.append(f"{len(pairs):,} of {len(here):,} greedy answers differ from the policy's")
        return
    check.count(problems=len(here))
    for a, b in pairs:
        how = f"answered {a.completion[:_SHOWN]!r}, but the policy answers {b.completion[:_SHOWN]!r}"
        check.differs(f"problem {a.problem_id}", how, problems=1)


def _accuracy(engine: Loaded, meant: Against, shares: Sequence[float], recorded: Evaluation | None) -> str:
    """Return the accuracy of the checkpoint beside the run's; the policy answered here too, so that where both do alike
    a difference from the record is one of dtype or machine."""
    here, own = (f"{100 * share:.1f} %" for share in shares)
    if recorded is None:
        return f"accuracy {here}; the run was not evaluated as this checkpoint computes"
    then = f"the run recorded {100 * recorded.strict:.1f} %"
    if engine.dtype != meant.dtype:
        return f"accuracy {here} in {engine.dtype}, as engines compute; {then} in {meant.dtype}"
    if recorded.strict == shares[0]:
        return f"accuracy {here}, as the run recorded"
    return f"accuracy {here}, of the policy itself {own}; {then}, on another machine or by other versions"
