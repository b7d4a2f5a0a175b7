"""The audit of an engine against the trainer's own model: its weights, its scores of tokens, the order of prompts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.engines.parity.calls import ALONE, Pairs, in_other_orders, with_scaled_norms
from fp4rl.engines.parity.scores import (
    Limits,
    compare_scores,
    distance,
    drawn,
    drawn_at_random,
    in_float32,
    in_words,
    k3_limit,
    loose,
    rounding_points,
    scored,
    without,
)
from fp4rl.inject.attach import Attachment, attach
from fp4rl.rl.generate import Generation, Sampler, Sampling, evidence_of
from fp4rl.spec.errors import CheckFailed, EngineDiffers
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import GRADIENTS
from fp4rl.spec.retarget import under_deployment
from fp4rl.spec.words import counted

_ROUNDED_IN = ("rollout", "training")  # phases

OnProgress = Callable[[int, int], None]
"""Called with (parts of the audit that are done, all of them)."""


@dataclass(frozen=True)
class Check:
    """The answer of one check, in words and in numbers. `passed` is None where it only tells something.

    `tensors`: those that differ, by name, where the check compares tensors.
    """

    name: str
    passed: bool | None
    seen: str
    numbers: dict[str, float] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """An engine under audit: how it samples, and how its weights are compared with the stream of the live model.

    `held` gets the live model and its attachment after a call, returns what was compared in words, and raises
    CheckFailed where a value differs.
    """

    name: str
    sampler: Sampler
    held: Callable[[PreTrainedModel, Attachment | None], str]


@torch.no_grad()
def audit(
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    injection: Injection | None,
    prompts: Sequence[list[int]],
    new_tokens: int,
    deployment: str | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> Iterator[Check]:
    """Yield the checks of an engine that samples for `model` under `injection`, in the phase of rollouts.

    Scores are those of the trainer's model in the same phase. `deployment` adds what its kernel's own rules would
    change. The engine that finds by itself that it is another policy ends the audit with that check.
    """
    attachment = attach(model, injection) if injection is not None else None
    sampling = Sampling(new_tokens, 1.0, logps=True)
    sampler = _Told(engine.sampler, 8 + len(prompts[:ALONE]) + int(deployment is not None), on_progress)
    try:
        _switch(attachment, "rollout")
        torch.manual_seed(0)
        answers = sampler(model, tokenizer, prompts, sampling)
        _require_calls(attachment)
        yield _weights(engine, model, attachment)
        sampler.step()
        score = partial(scored, model, prompts, answers, tokenizer)
        _switch(attachment, "training")
        trained = score()
        sampler.step()
        yield from _cache(attachment)
        _switch(attachment, "rollout")
        own, others = _expected(attachment, trained, score)
        yield from _phases(own, trained)
        ways = in_other_orders(sampler, model, tokenizer, prompts, new_tokens)
        rescaled = with_scaled_norms(sampler, model, tokenizer, prompts, sampling)
        yield from _versions(engine.sampler, sampler.calls)
    except EngineDiffers as error:
        yield Check(error.check, False, str(error), tensors=error.tensors)
        return
    finally:
        if attachment is not None:
            attachment.remove()
    limits = Limits(k3_limit(model), _float32_mean(model, injection, score, own), loose(injection))
    sampler.step()
    scores = Check("scores", *compare_scores([drawn(answer) for answer in answers], own, others, limits))
    yield scores
    if scores.passed:  # else the engine differs whatever the weights
        yield Check("refresh", *compare_scores(*rescaled, {}, limits))
    yield _order(ways, replace(limits, loose=drawn_at_random(injection)))
    if deployment is not None and injection is not None:
        with attach(model, under_deployment(injection, deployment)) as other:
            other.set_phase("training")
            served = score()
            sampler.step()
            yield _rules(trained, served, deployment)


def _expected(
    attachment: Attachment | None, trained: list[Tensor], score: Callable[[], list[Tensor]]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Return what the engine should score, in the phase of rollouts, and the same without each point that rounds."""
    if attachment is None:
        return trained, {}
    injection = attachment.table.injection
    own = trained if injection.acts_in("rollout") == injection.acts_in("training") - set(GRADIENTS) else score()
    others = {}
    for point in rounding_points(attachment):
        with without(attachment, point):
            others[point] = score()
    return own, others


def _phases(own: Sequence[Tensor], trained: Sequence[Tensor]) -> Iterator[Check]:
    """Tell how far the policy that samples is from the one that is trained, where the injection has two."""
    if own is not trained:
        numbers = distance(own, trained)
        yield Check("phases", None, f"rollout and training round differently: {in_words(numbers)}", numbers)


def _float32_mean(
    model: PreTrainedModel, injection: Injection | None, score: Callable[[], list[Tensor]], own: list[Tensor]
) -> float | None:
    """Return the nats by which a 16-bit model's scores are from those of float32 arithmetic; None for a float32 one."""
    if next(model.parameters()).dtype == torch.float32:
        return None
    with in_float32(model), attach(model, injection) if injection is not None else nullcontext() as attachment:
        _switch(attachment, "rollout")
        return distance(score(), own)["mean"]


class _Told:
    """A sampler whose calls, and whatever else is done between them, are told as progress."""

    def __init__(self, sampler: Sampler, total: int, on_progress: OnProgress) -> None:
        self.sampler, self.total, self.on_progress = sampler, total, on_progress
        self.calls = self.done = 0

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        sampling: Sampling,
    ) -> list[Generation]:
        """Answer as the sampler does."""
        answers = self.sampler(model, tokenizer, prompts, sampling)
        self.calls += 1
        self.step()
        return answers

    def step(self) -> None:
        """Tell that one more part is done."""
        self.done += 1
        self.on_progress(self.done, self.total)


def _switch(attachment: Attachment | None, phase: str) -> None:
    if attachment is not None:
        attachment.set_phase(phase)  # type: ignore[arg-type]


def _require_calls(attachment: Attachment | None) -> None:
    """Raise EngineDiffers where the engine answered without calling a site, or rounded nothing there."""
    try:
        if attachment is not None:
            attachment.require_calls()
    except CheckFailed as error:
        raise EngineDiffers(str(error), "calls") from None


def _weights(engine: Engine, model: PreTrainedModel, attachment: Attachment | None) -> Check:
    try:
        return Check("weights", True, engine.held(model, attachment))
    except EngineDiffers as error:
        return Check("weights", False, str(error), tensors=error.tensors)
    except CheckFailed as error:
        return Check("weights", False, str(error))


def _versions(sampler: Sampler, calls: int) -> Iterator[Check]:
    """Yield, of an engine that serves weights under versions, whether each call had one of its own in its answers."""
    served = [line.weight_version for line in evidence_of(sampler)]
    if served:
        own = len(set(served)) == len(served) == calls
        words = f"{calls} calls, answered with {len(set(served))} versions of the weights: {served[0]} to {served[-1]}"
        yield Check("versions", own, words, {"calls": float(calls), "versions": float(len(set(served)))})


def _cache(attachment: Attachment | None) -> Iterator[Check]:
    """Tell how keys and values were rounded while the engine sampled, and in the trainer's pass: no cause of itself."""
    rows = [row for row in (attachment.evidence() if attachment is not None else ()) if row.point == "kv_cache"]
    sampled = [row for row in rows if row.phase == "rollout"]
    if not sampled:
        return
    errors = {phase: [row.relative_error or 0.0 for row in rows if row.phase == phase] for phase in _ROUNDED_IN}
    numbers = {"sites": float(len(sampled)), "elements": float(sum(row.elements for row in sampled))}
    numbers |= {f"{phase}_error": sum(each) / len(each) for phase, each in errors.items() if each}
    trained = f"{numbers['training_error']:.2%}" if errors["training"] else "nothing"
    formats = ", ".join(sorted({str(row.format) for row in sampled}))
    yield Check(
        "kv_cache",
        None,
        f"{counted(len(sampled), 'site')} rounded {counted(int(numbers['elements']), 'value')} of keys and values to "
        f"{formats} while sampling, by {numbers['rollout_error']:.2%} on average; the trainer's pass by {trained}",
        numbers,
    )


def _order(ways: Mapping[str, Pairs], limits: Limits) -> Check:
    """Judge answers in one batch against the same prompts otherwise: each way, and all of them, since one is short."""
    each = {name: distance(*pairs) for name, pairs in ways.items()}
    numbers = distance(*([scores for pairs in ways.values() for scores in pairs[side]] for side in (0, 1)))
    passed = limits.hold(numbers) and all(way["k3"] <= limits.k3 for way in each.values())
    words = ", ".join(f"{name} {way['max']:.2g}" for name, way in each.items())
    numbers |= {f"{name}_{key}": way[key] for name, way in each.items() for key in ("max", "k3")}
    return Check("order", passed, f"largest difference in nats against one batch: {words}", numbers)


def _rules(own: Sequence[Tensor], served: Sequence[Tensor], deployment: str) -> Check:
    numbers = distance(own, served)
    return Check("rules", None, f"under the rules of {deployment} the same tokens score: {in_words(numbers)}", numbers)
