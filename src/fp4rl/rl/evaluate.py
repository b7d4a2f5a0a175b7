"""Judge a policy: answers to held-out problems under a named precision, one row kept per problem and sample."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.rl.generate import Generation, Sampler, Sampling, transformers_sampler
from fp4rl.rl.prompts import encoded, require_positions
from fp4rl.rl.rewards import Scorer
from fp4rl.spec import evidence
from fp4rl.spec.task import SCORES, Problem, Score


@dataclass(frozen=True, kw_only=True)
class Item(Score):
    """One answer with its score. `length` counts generated tokens, the end-of-sequence token included."""

    problem_id: str
    sample: int
    completion: str
    length: int
    truncated: bool


@dataclass(frozen=True)
class Evaluation:
    """The rows of one evaluation and the profile they were measured under."""

    step: int
    last: bool
    profile: evidence.Profile
    items: tuple[Item, ...]

    def share(self, what: str) -> float:
        """Return the share of the answers that have a score of `SCORES`, or are `truncated`."""
        return sum(bool(getattr(item, what)) for item in self.items) / len(self.items)

    def pass_at(self, k: int) -> float:
        """Chance that at least one of `k` answers to a problem is right, unbiased (arXiv 2107.03374, eq. 1)."""
        right: dict[str, list[bool]] = {}
        for item in self.items:
            right.setdefault(item.problem_id, []).append(item.strict)
        return sum(1 - comb(len(r) - sum(r), k) / comb(len(r), k) for r in right.values()) / len(right)

    def summary(self) -> evidence.Evaluation:
        """Shares over all items, beside the profile.

        With several answers to each problem also `mean@k`, the mean accuracy, and `pass@k`, that one of k is right.
        """
        shares = {name: self.share(name) for name in SCORES}
        evaluation = evidence.Evaluation(
            step=self.step,
            last=self.last,
            profile=self.profile,
            n=len(self.items),
            strict=shares.pop("strict"),
            flexible=shares.pop("flexible"),
            formatted=shares.pop("formatted"),
            truncated=self.share("truncated"),
            mean_length=sum(i.length for i in self.items) / len(self.items),
            answers_digest=answers_digest(self.items),
            of_samples=shares,
        )
        samples = max(item.sample for item in self.items) + 1
        if samples == 1:
            return evaluation
        powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
        passed = {f"pass@{k}": self.pass_at(k) for k in (*powers, samples)}
        mean = {f"mean@{samples}": self.share("strict")}
        return evaluation.extended(problems=len(self.items) // samples, of_samples=shares | mean | passed)


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: `samples` 1 is greedy, more are drawn at `temperature` from `seed`.

    Each of the texts in `stop` ends an answer and is no part of it.
    """

    max_new_tokens: int = 48
    batch_size: int = 256
    samples: int = 1
    temperature: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    @property
    def sampling(self) -> Sampling:
        """The same as a sampler is asked for it."""
        temperature = self.temperature if self.samples > 1 else 0.0
        return Sampling(self.max_new_tokens, temperature, count=self.samples, stop=self.stop)

    @property
    def name(self) -> str:
        """What the profile calls it."""
        drawn = "greedy" if self.samples == 1 else f"{self.samples} samples at temperature {self.temperature:g}"
        return f"{drawn}, to {' or '.join(map(repr, self.stop))}" if self.stop else drawn


def items_digest(problems: Sequence[Problem]) -> str:
    """Twelve hex digits over the identities of the problems, in order."""
    return hashlib.sha256("\n".join(p.id for p in problems).encode()).hexdigest()[:12]


def answers_digest(items: Sequence[Item]) -> str:
    """Twelve hex digits over all answers, as they were generated: equal digests are the same answers (P48)."""
    rows = (f"{item.problem_id}\x1f{item.sample}\x1f{item.length}\x1f{item.completion}" for item in items)
    return hashlib.sha256("\x1e".join(rows).encode("utf-8", "surrogatepass")).hexdigest()[:12]


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    scorer: Scorer,
    decoding: Decoding,
    on_batch: Callable[[int, int], None] | None = None,
    sampler: Sampler = transformers_sampler,
) -> tuple[Item, ...]:
    """Generate and score answers to `problems`; rows come back in the order of `problems`, samples of one together.

    Batches hold prompts of similar length, since left padding is wasted work. `on_batch` hears (done, all).
    """
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].prompt))
    require_positions(model, tokenizer, problems[order[-1]], decoding.max_new_tokens)
    size = max(decoding.batch_size // decoding.samples, 1)
    rows: dict[int, list[Item]] = {}
    # Sampling draws from torch's global generator; forked, so that judging never moves the training's randomness.
    with torch.random.fork_rng():
        torch.manual_seed(decoding.seed)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            prompts = encoded(model, tokenizer, [problems[i] for i in chosen])
            answers = iter(sampler(model, tokenizer, prompts, decoding.sampling))
            for i in chosen:
                samples = itertools.islice(answers, decoding.samples)
                rows[i] = [_item(problems[i], sample, generation, scorer) for sample, generation in enumerate(samples)]
            if on_batch is not None:
                on_batch(min(start + size, len(order)), len(order))
    return tuple(item for i in range(len(problems)) for item in rows[i])


def _item(problem: Problem, sample: int, answer: Generation, scorer: Scorer) -> Item:
    score = scorer(problem, answer.text)
    return Item(
        **vars(score),
        problem_id=problem.id,
        sample=sample,
        completion=answer.text,
        length=len(answer.tokens),
        truncated=not answer.ended,
    )
