"""The answers of an evaluation: each with its score, and the shares that they come to."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fp4rl.rl.divergence import Divergence
from fp4rl.rl.of_samples import majority_at, pass_at
from fp4rl.spec import evidence
from fp4rl.spec.task import SCORES, Score


@dataclass(frozen=True, kw_only=True)
class Item(Score):
    """One answer with its score. `length` counts generated tokens, the end-of-sequence token included; `read` is the
    answer that the task reads out of it, None where it reads none or does not tell."""

    problem_id: str
    sample: int
    completion: str
    length: int
    truncated: bool
    read: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """The rows of one evaluation and the profile they were measured under."""

    step: int
    last: bool
    profile: evidence.Profile
    items: tuple[Item, ...]
    divergence: Divergence | None = None

    def share(self, what: str) -> float:
        """Return the share of the answers that have a score of `SCORES`, or are `truncated`."""
        return sum(bool(getattr(item, what)) for item in self.items) / len(self.items)

    def by_problem(self) -> dict[str, list[Item]]:
        """Return the answers to each problem, in order."""
        answers: dict[str, list[Item]] = {}
        for item in self.items:
            answers.setdefault(item.problem_id, []).append(item)
        return answers

    def of_samples(self, powers: Sequence[int]) -> dict[str, float]:
        """Return `pass@k` for each k, and `maj@k` where the task tells which answers it reads, as means over problems.

        An answer is right by majority where any of its wordings was scored as right.
        """
        answers = list(self.by_problem().values())
        right = [sum(item.strict for item in items) for items in answers]
        n = len(answers[0])
        shares = {f"pass@{k}": sum(pass_at(each, n, k) for each in right) / len(right) for k in powers}
        if all(item.read is None for item in self.items) and any(right):
            return shares
        votes = [Counter(item.read for item in items) for items in answers]
        solved = [{item.read for item in items if item.strict} for items in answers]
        for k in powers[1:]:
            won = (majority_at(*each, k) for each in zip(votes, solved, strict=True))
            shares[f"maj@{k}"] = sum(won) / len(votes)
        return shares

    def summary(self) -> evidence.Evaluation:
        """Return shares over all items, with the profile.

        With several answers to each problem also `mean@k`, the mean accuracy, `pass@k`: at least one of k is right, and
        `maj@k`: the most frequent of k is right.
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
        if (far := self.divergence) is not None:
            evaluation = evaluation.extended(kl=far.kl, same_top=far.same_top, kl_tokens=far.tokens)
        samples = max(item.sample for item in self.items) + 1
        if samples == 1:
            return evaluation
        powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
        mean = {f"mean@{samples}": self.share("strict")}
        of_samples = shares | mean | self.of_samples((*powers, samples))
        return evaluation.extended(problems=len(self.items) // samples, of_samples=of_samples)


def answers_digest(items: Sequence[Item]) -> str:
    """Return twelve hex digits over all answers as generated; equal digests mean the same answers."""
    rows = (f"{item.problem_id}\x1f{item.sample}\x1f{item.length}\x1f{item.completion}" for item in items)
    return hashlib.sha256("\x1e".join(rows).encode("utf-8", "surrogatepass")).hexdigest()[:12]


class Answered(NamedTuple):
    """What a policy answered under one profile, the evidence of what was rounded meanwhile, and its divergence."""

    items: tuple[Item, ...]
    lines: tuple[evidence.Evidence, ...]
    far: Divergence | None
