"""Evaluate a policy: answers to held-out problems under named precisions, one row kept per problem and sample.

Evaluated is always a model folder on disk, never the live model.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.inject.attach import Attachment, attach
from fp4rl.inject.label import label
from fp4rl.rl.divergence import Divergence, Kept, divergence
from fp4rl.rl.generate import Sampler, Sampling, evidence_of, sampler_named, transformers_sampler
from fp4rl.rl.of_samples import majority_at, pass_at
from fp4rl.rl.problems import problems_of
from fp4rl.rl.profiles import Precision, precision_named
from fp4rl.rl.prompts import encoded, require_positions
from fp4rl.rl.rewards import Scorer
from fp4rl.rl.verify import Record, load_saved, rounded, weights_unchanged
from fp4rl.spec import evidence
from fp4rl.spec.errors import located
from fp4rl.spec.evaluation import Evaluation as EvaluationSpec
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import ExpertsImplementation, Lora
from fp4rl.spec.rollout import TRANSFORMERS, RolloutEngine
from fp4rl.spec.task import SCORES, Problem, Score, Task


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


def items_digest(problems: Sequence[Problem]) -> str:
    """Return twelve hex digits over the problems; equal digests mean the same problems in the same order."""
    return hashlib.sha256("\n".join(p.id for p in problems).encode()).hexdigest()[:12]


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    scorer: Scorer,
    spec: EvaluationSpec,
    on_batch: Callable[[int, int], None] | None = None,
    sampler: Sampler = transformers_sampler,
) -> tuple[Item, ...]:
    """Generate and score answers to `problems`; rows come back in the order of `problems`, samples of one together.

    Batches hold prompts of similar length, since left padding is wasted work. `on_batch` is called with (done, all).
    """
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].prompt))
    require_positions(model, tokenizer, problems[order[-1]], spec.max_new_tokens)
    size = max(spec.batch_size // spec.samples, 1)
    temperature = spec.temperature if spec.samples > 1 else 0.0
    sampling = Sampling(spec.max_new_tokens, temperature, count=spec.samples, stop=spec.stop or ())
    rows: dict[int, list[Item]] = {}
    # Sampling draws from torch's global generator; forked, so that evaluation never moves the training's randomness.
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            prompts = encoded(model, tokenizer, [problems[i] for i in chosen])
            answers = iter(sampler(model, tokenizer, prompts, sampling))
            for i in chosen:
                rows[i] = [
                    Item(
                        **vars(scorer(problems[i], generated.text)),
                        problem_id=problems[i].id,
                        sample=sample,
                        completion=generated.text,
                        length=len(generated.tokens),
                        truncated=not generated.ended,
                    )
                    for sample, generated in enumerate(itertools.islice(answers, spec.samples))
                ]
            if on_batch is not None:
                on_batch(min(start + size, len(order)), len(order))
    return tuple(item for i in range(len(problems)) for item in rows[i])


@dataclass(frozen=True)
class EvaluationRunner:
    """Evaluates models on held-out problems under each profile; the same for every step of a run.

    `injection` is the run's own: what `deployment` means. Noise on weights is off in every profile. `lora`: a folder
    without an adapter is evaluated under a fresh one, which changes no number.
    """

    spec: EvaluationSpec
    injection: Injection | None
    task: Task
    problems: tuple[Problem, ...]
    lora: Lora | None = None
    rollout: RolloutEngine = TRANSFORMERS
    experts: ExpertsImplementation | None = None

    def precisions(self, *, last: bool = True) -> dict[str, Precision]:
        """Return profile -> its injection; the robustness sweep is for the `last` step. NotFoundError if unknown."""
        names = [*self.spec.profiles, *(self.spec.sweep if last else ())]
        return {name: precision_named(name, self.spec, self.injection) for name in names}

    def run(
        self,
        folder: Path,
        dtype: str,
        step: int,
        last: bool,
        on_items: Callable[[str, int, int], None] = lambda *_: None,
        record: Record = lambda _: None,
    ) -> Iterator[Evaluation]:
        """Load `folder` and answer all problems once per profile; `record` gets the evidence of what was rounded.

        `on_items` is called with (profile, done, all). Raises CheckFailed for sites that were never called while
        answering, and for changed master weights; NotFinite for logits that are no numbers.
        """
        model, tokenizer = load_saved(folder, dtype, self.lora, self.experts)
        sampler = sampler_named(self.rollout)
        for name, precision in self.precisions(last=last).items():
            on_answered, far = partial(on_items, name), None
            kept = Kept(sampler) if self.spec.kl else None
            with (
                weights_unchanged(model, "evaluation", step, record, profile=name),
                _injected(model, precision.injection) as attachment,
            ):
                with located(f"evaluation as {name}"):
                    items = answer(
                        model, tokenizer, self.problems, self.task.score, self.spec, on_answered, kept or sampler
                    )
                items = tuple(replace(item, read=self.task.extracted(item.completion)) for item in items)
                for served in evidence_of(sampler):
                    record(served.extended(profile=name, step=step))
                if attachment is not None:  # evidence: what should have acted meanwhile, and what did
                    attachment.require_calls()
                    points = attachment.table.active_sites("evaluation")
                    plan: evidence.Evidence = evidence.ActivePoints(phase="evaluation", points=points)
                    for line in (plan, rounded(attachment, step), *attachment.evidence()):
                        record(line.extended(profile=name, step=step))
                if kept is not None:
                    on_rows = partial(on_items, f"{name}, KL")
                    far = divergence(model, attachment, kept.rows, self.spec.batch_size, on_rows)
            yield Evaluation(step, last, self._profile(name, precision, attachment), items, far)

    def _profile(self, name: str, precision: Precision, attachment: Attachment | None) -> evidence.Profile:
        spec, table = self.spec, attachment.table if attachment is not None else None
        drawn = "greedy" if spec.samples == 1 else f"{spec.samples} samples at temperature {spec.temperature:g}"
        drawn += f", seed {spec.seed}" if spec.samples > 1 and spec.seed else ""
        ends = f", to {' or '.join(map(repr, spec.stop))}" if spec.stop else ""
        injection, engine = precision.injection, self.rollout.engine
        # Where only hardware errors are described, which do not act in evaluations, it is `full` and has no digest.
        digest = table.digest_in("evaluation") if table is not None and table.active_sites("evaluation") else None
        return evidence.Profile(
            name=name,
            precision=label(table),
            sites_digest=digest,
            noise=precision.noise,
            scorer=self.task.scored_as,
            max_new_tokens=spec.max_new_tokens,
            sampling=drawn + ends + (f", by {engine}" if engine != "transformers" else ""),
            items_digest=items_digest(self.problems),
            deployment=injection.deployment if injection is not None and digest is not None else None,
        )


def evaluation_runner(experiment: Experiment) -> EvaluationRunner:
    """Make the runner of an experiment, with its held-out problems."""
    task = experiment.task
    spec = experiment.evaluation.for_task(task)
    problems = problems_of(experiment, spec.split, spec.count)
    model, rollout = experiment.model, experiment.rollout
    how = model.experts_implementation
    return EvaluationRunner(spec, experiment.injection, task, problems, model.lora, rollout, how)


def choosing_runner(experiment: Experiment) -> EvaluationRunner:
    """Make the runner by which the best step is chosen: on the validation split, as deployed where anything is."""
    spec = experiment.evaluation
    profile = "deployment" if "deployment" in spec.profiles else spec.profiles[0]
    changed = {"split": "validation", "profiles": (profile,), "matmul_noise": (), "formats": (), "kl": False}
    return evaluation_runner(experiment.model_copy(update={"evaluation": spec.model_copy(update=changed)}))


@contextmanager
def _injected(model: PreTrainedModel, injection: Injection | None) -> Iterator[Attachment | None]:
    if injection is None:
        yield None
        return
    # Packing would leave rounded weights behind for the next profile; `copy` gives the same numbers.
    with attach(model, injection.model_copy(update={"frozen_base": "copy"})) as attachment:
        attachment.set_phase("evaluation")
        yield attachment


def evaluate(folder: Path, experiment: Experiment) -> tuple[Evaluation, ...]:
    """Evaluate the model in `folder` as `experiment` would: its task, its held-out problems, every profile it names.

    Raises NotFoundError for a folder, a file or a profile that does not exist.
    """
    runner = evaluation_runner(experiment)
    return tuple(runner.run(folder, experiment.model.dtype, experiment.training.steps, last=True))
