"""Scores of the same tokens by an engine and by the trainer's model: how far apart, and how far they may be.

Three limits, since each alone lets something pass. k3 bounds the damage to training. Arithmetic bounds what is not
damage yet: in float32 an engine repeats the trainer's numbers, and in 16 bits both are as far from a float32 pass of
the same weights. What the engine does at a point that rounds (inputs, outputs, keys and values) is measured along the
difference that leaving the point out makes: with right = own scores and wrong = scores without the point, the share

    missing = <engine - right, wrong - right> / <wrong - right, wrong - right>

is 0 for an engine that rounds as the trainer and 1 for one that does not. Arithmetic noise averages out of it over
tokens, so that it tells the two apart where the noise of one token is far larger than the effect.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.inject.attach import Attachment
from fp4rl.models.positions import forward_inputs
from fp4rl.rl.generate import Generation, dropout_off
from fp4rl.rl.mismatch import DECODED, DECODED_FUSED, mismatch_metrics
from fp4rl.rl.prompts import padded
from fp4rl.spec.injection import Injection
from fp4rl.spec.shared_scales import shared_scales
from fp4rl.spec.words import counted

NATS = (1e-4, 1e-2)  # differences whose share of the tokens is counted
_APART = 0.05  # share of tokens that may be more than NATS[0] apart in float32, where one bit may flip a rounded value
_FURTHER = 3.0  # times the distance of the trainer's 16 bits from float32, in the mean: two such errors, and a margin
_MISSING, _SURE = 0.25, 0.5  # of a point: a share that fails beyond doubt, and two standard errors that tell nothing
_POINTS = ("input", "output", "kv_cache")


@dataclass(frozen=True)
class Limits:
    """How far two scorings of the same tokens may be apart. `k3` in nats; a token without a number is too far.

    `near`: nats by which the model's 16 bits are from float32 on average, None where it is float32 itself. `loose`: why
    a pass over whole answers rounds otherwise than token by token, so that k3 alone is judged; empty where it does not.
    """

    k3: float
    near: float | None = None
    loose: str = ""

    def hold(self, numbers: Mapping[str, float]) -> bool:
        """Return whether a `distance` is within the limits."""
        if not numbers["tokens"] or numbers["missing"] or numbers["k3"] > self.k3:
            return False
        if self.loose:
            return True
        if self.near is None:
            return numbers[f"share_over_{NATS[0]:g}"] <= _APART
        return numbers["mean"] <= _FURTHER * self.near + NATS[0]


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


def drawn(answer: Generation) -> Tensor:
    """Return the log-probabilities of an answer's tokens as the engine gave them; NaN where it gave none."""
    return torch.full((len(answer.tokens),), torch.nan) if answer.logps is None else answer.logps.cpu()


@contextmanager
def without(attachment: Attachment, point: str) -> Iterator[None]:
    """Leave a point of the injection out of the present phase."""
    phase = attachment.phase
    for state in attachment.states.values():
        state.enter(phase, state.points - {point})
    try:
        yield
    finally:
        attachment.set_phase(phase)


def rounding_points(attachment: Attachment) -> tuple[str, ...]:
    """Return the points besides weights that round somewhere in the present phase."""
    present = {point for state in attachment.states.values() for point in state.points}
    return tuple(point for point in _POINTS if point in present)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Hold the parameters in float32 for a while; 16-bit values come back as they were, bit for bit."""
    dtypes = {parameter: parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    buffers = {buffer: buffer.data for buffer in model.buffers() if buffer.is_floating_point()}
    for tensor in (*dtypes, *buffers):
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
        for buffer, before in buffers.items():
            buffer.data = before


def drawn_at_random(injection: Injection | None) -> str:
    """Return what two passes of one model draw differently; empty where nothing is drawn."""
    if injection is not None and injection.errors:
        return "hardware errors are drawn"
    stochastic = injection is not None and any(fmt.rounding == "stochastic" for fmt in injection.formats)
    return "rounding is stochastic" if stochastic else ""


def loose(injection: Injection | None) -> str:
    """Return why decoding and a pass over whole answers round the same token differently; empty where they do not."""
    shared = shared_scales(injection, "rollout", "training")
    return drawn_at_random(injection) or (f"tokens share a scale ({', '.join(shared)})" if shared else "")


def distance(first: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
    """Return how far two scorings of the same tokens are apart: mean, max, k3 (nats), and shares beyond limits.

    `missing` counts the tokens that one of them gives no finite number for; they are left out of the rest.
    """
    a, b = torch.cat(list(first)), torch.cat(list(other))
    real = a.isfinite() & b.isfinite()
    missing = float((~real).sum())
    a, b = a[real], b[real]
    if not len(a):
        return {"tokens": 0.0, "missing": missing, "mean": 0.0, "max": 0.0, "k3": 0.0}
    apart = (a - b).abs()
    k3 = mismatch_metrics(a[None], b[None], torch.ones(1, len(a)))["rollout_corr/k3_kl"]
    numbers = {"tokens": float(len(a)), "missing": missing, "mean": float(apart.mean()), "max": float(apart.max())}
    return {**numbers, "k3": k3} | {f"share_over_{nats:g}": float((apart > nats).float().mean()) for nats in NATS}


def in_words(numbers: dict[str, float]) -> str:
    """Return a distance in words."""
    if not numbers["tokens"]:
        return "the engine gave no log-probability"
    shares = ", ".join(f"{100 * numbers[f'share_over_{nats:g}']:.3g} % over {nats:g}" for nats in NATS)
    lost = f"; none for {counted(int(numbers['missing']), 'token')}" if numbers["missing"] else ""
    return (
        f"{numbers['tokens']:.0f} tokens, {numbers['mean']:.2g} nats apart on average, {numbers['max']:.2g} at most "
        f"({shares}), k3 {numbers['k3']:.2g}{lost}"
    )


def k3_limit(model: nn.Module) -> float:
    """Return the nats a token (k3) that damage no training: less in float32."""
    return DECODED if next(model.parameters()).dtype == torch.float32 else DECODED_FUSED


def compare_scores(
    given: Sequence[Tensor], own: Sequence[Tensor], others: Mapping[str, Sequence[Tensor]], limits: Limits
) -> tuple[bool, str, dict[str, float]]:
    """Return whether an engine's scores are the model's `own`, in words and numbers; `others`: without each point."""
    numbers = distance(own, given)
    passed, words = limits.hold(numbers), [in_words(numbers)]
    if not numbers["tokens"]:
        return False, words[0], numbers
    if limits.loose:
        return passed, f"{words[0]}; only k3 is judged: {limits.loose}", numbers
    if limits.near is not None:
        numbers["float32_mean"] = limits.near
        words.append(f"the model itself is {limits.near:.2g} from its float32 pass")
    for point, wrong in others.items():
        share, unsure = _missing(given, own, wrong)
        few = ", which so few tokens do not tell" if unsure > _SURE else ""
        words.append(f"of the effect of rounding {point} {round(share, 2) + 0.0:.0%} is missing (+- {unsure:.0%}{few})")
        numbers |= {f"{point}_missing": share, f"{point}_missing_error": unsure}
        passed &= share - unsure <= _MISSING
    return passed, "; ".join(words), numbers


def _missing(given: Sequence[Tensor], right: Sequence[Tensor], wrong: Sequence[Tensor]) -> tuple[float, float]:
    """Return the share of a point's effect that an engine lacks, and two standard errors; see the file's head."""
    engine, own, other = (torch.cat(list(each)).double() for each in (given, right, wrong))
    real = engine.isfinite() & own.isfinite() & other.isfinite()
    off, effect = (engine - own)[real], (other - own)[real]
    power = float(effect @ effect)
    if not power:
        return 0.0, 1.0
    share = float(off @ effect) / power
    rest = off - share * effect
    return share, 2 * sqrt(float((rest * effect).square().sum())) / power
