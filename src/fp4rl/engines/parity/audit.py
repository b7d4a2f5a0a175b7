"""The audit of an engine against the trainer's own model: its weights, its scores of tokens, the order of prompts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.inject.attach import Attachment, attach
from fp4rl.models.positions import forward_inputs
from fp4rl.rl.generate import Generation, Sampler, Sampling, dropout_off, evidence_of
from fp4rl.rl.mismatch import DECODED, DECODED_FUSED, mismatch_metrics
from fp4rl.rl.prompts import padded
from fp4rl.spec.errors import CheckFailed, EngineDiffers
from fp4rl.spec.injection import Injection
from fp4rl.spec.retarget import under_deployment
from fp4rl.spec.words import counted

_ROUNDED_IN = ("rollout", "training")  # phases
NATS = (1e-4, 1e-2)  # differences whose share of the tokens is counted
_ALONE = 4  # prompts that are also answered one by one

OnProgress = Callable[[int, int], None]
"""Called with (parts of the audit that are done, all of them)."""


@dataclass(frozen=True)
class Check:
    """The answer of one check, in words and in numbers. `passed` is None where it only tells something."""

    name: str
    passed: bool | None
    seen: str
    numbers: dict[str, float] = field(default_factory=dict)


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

    Scores are those of the training phase. `deployment` adds what its kernel's own rules would change. The engine that
    finds by itself that it is another policy ends the audit with that check.
    """
    attachment = attach(model, injection) if injection is not None else None
    sampling = Sampling(new_tokens, 1.0, logps=True)
    sampler = _Told(engine.sampler, 6 + len(prompts[:_ALONE]) + int(deployment is not None), on_progress)
    try:
        _switch(attachment, "rollout")
        torch.manual_seed(0)
        answers = sampler(model, tokenizer, prompts, sampling)
        _require_calls(attachment)
        yield _weights(engine, model, attachment)
        sampler.step()
        limit = _limit(model)
        _switch(attachment, "training")
        own = scored(model, prompts, answers, tokenizer)
        sampler.step()
        yield from _cache(attachment)
        yield _scores(answers, own, limit)
        _switch(attachment, "rollout")
        yield _order(sampler, model, tokenizer, prompts, new_tokens, limit)
        yield from _versions(engine.sampler, sampler.calls)
    except EngineDiffers as error:
        yield Check(error.check, False, str(error))
        return
    finally:
        if attachment is not None:
            attachment.remove()
    if deployment is not None and injection is not None:
        with attach(model, under_deployment(injection, deployment)) as other:
            other.set_phase("training")
            served = scored(model, prompts, answers, tokenizer)
            sampler.step()
            yield _rules(own, served, deployment)


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


def scored(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    answers: Sequence[Generation],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Tensor]:
    """Return log-probabilities of the tokens of each answer under the live model: one pass over all, padded left."""
    ids, mask = padded([[*p, *a.tokens] for p, a in zip(prompts, answers, strict=True)], tokenizer.pad_token_id)
    device = next(model.parameters()).device
    with dropout_off(model):
        logits = model(**forward_inputs(model, ids.to(device), mask.to(device))).logits.float().log_softmax(-1)
    made = []
    for row, answer in enumerate(answers):
        count = len(answer.tokens)
        drawn = torch.tensor(answer.tokens, device=device)
        made.append(logits[row, -count - 1 : -1].gather(-1, drawn[:, None]).squeeze(-1).cpu())
    return made


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


def _limit(model: PreTrainedModel) -> float:
    """Return the nats a token (k3) by which arithmetic alone may move scores: less in float32."""
    return DECODED if next(model.parameters()).dtype == torch.float32 else DECODED_FUSED


def _weights(engine: Engine, model: PreTrainedModel, attachment: Attachment | None) -> Check:
    try:
        return Check("weights", True, engine.held(model, attachment))
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


def _scores(answers: Sequence[Generation], own: Sequence[Tensor], limit: float) -> Check:
    numbers = _distance(own, [_drawn(answer) for answer in answers])
    passed = numbers["tokens"] > 0 and numbers["k3"] <= limit
    return Check("scores", passed, _in_words(numbers), numbers)


def _drawn(answer: Generation) -> Tensor:
    """Return the log-probabilities of an answer's tokens as the engine gave them; NaN where it gave none."""
    return torch.full((len(answer.tokens),), torch.nan) if answer.logps is None else answer.logps.cpu()


def _order(
    sampler: Sampler,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    new_tokens: int,
    limit: float,
) -> Check:
    """Give greedy answers to all prompts at once, in the other order, once more, and to a few alone."""
    greedy = Sampling(new_tokens, 0.0, logps=True)
    together = sampler(model, tokenizer, prompts, greedy)
    ways = {
        "reversed": sampler(model, tokenizer, prompts[::-1], greedy)[::-1],
        "again": sampler(model, tokenizer, prompts, greedy),
        "alone": [sampler(model, tokenizer, [prompt], greedy)[0] for prompt in prompts[:_ALONE]],
    }
    numbers, worst = dict[str, float](), 0.0
    for name, answers in ways.items():
        pairs = [_alike(first, other) for first, other in zip(together, answers, strict=False)]
        distance = _distance([a for a, _ in pairs], [b for _, b in pairs])
        numbers |= {f"{name}_max": distance["max"], f"{name}_k3": distance["k3"]}
        worst = max(worst, distance["k3"])
    words = ", ".join(f"{name} {numbers[f'{name}_max']:.2g}" for name in ways)
    return Check("order", worst <= limit, f"largest difference in nats against one batch: {words}", numbers)


def _alike(first: Generation, other: Generation) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of two answers up to where they part: from there on they are of other texts."""
    same = next((at for at, (a, b) in enumerate(zip(first.tokens, other.tokens, strict=False)) if a != b), None)
    count = min(len(first.tokens), len(other.tokens)) if same is None else max(same, 1)
    return _drawn(first)[:count], _drawn(other)[:count]


def _rules(own: Sequence[Tensor], served: Sequence[Tensor], deployment: str) -> Check:
    numbers = _distance(own, served)
    return Check("rules", None, f"under the rules of {deployment} the same tokens score: {_in_words(numbers)}", numbers)


def _distance(first: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
    """Return how far two scorings of the same tokens are apart: mean, max, k3 (nats), and shares beyond limits."""
    a, b = torch.cat(list(first)), torch.cat(list(other))
    real = a.isfinite() & b.isfinite()
    a, b = a[real], b[real]
    if not len(a):
        return {"tokens": 0.0, "mean": 0.0, "max": 0.0, "k3": 0.0}
    apart = (a - b).abs()
    k3 = mismatch_metrics(a[None], b[None], torch.ones(1, len(a)))["rollout_corr/k3_kl"]
    numbers = {"tokens": float(len(a)), "mean": float(apart.mean()), "max": float(apart.max()), "k3": k3}
    return numbers | {f"share_over_{nats:g}": float((apart > nats).float().mean()) for nats in NATS}


def _in_words(numbers: dict[str, float]) -> str:
    if not numbers["tokens"]:
        return "the engine gave no log-probability"
    shares = ", ".join(f"{100 * numbers[f'share_over_{nats:g}']:.3g} % over {nats:g}" for nats in NATS)
    return (
        f"{numbers['tokens']:.0f} tokens, {numbers['mean']:.2g} nats apart on average, {numbers['max']:.2g} at most "
        f"({shares}), k3 {numbers['k3']:.2g}"
    )
