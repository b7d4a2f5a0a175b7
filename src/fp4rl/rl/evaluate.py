"""Evaluate a policy: answers to held-out problems under named precisions, one row kept per problem and sample.

Evaluated is always a model folder on disk, never the live model.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.inject.attach import Attachment, attach
from fp4rl.inject.label import label
from fp4rl.rl.answered import Answered, Evaluation, Item
from fp4rl.rl.divergence import Kept, divergence
from fp4rl.rl.generate import Sampler, Sampling, evidence_of, sampler_named, transformers_sampler
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
from fp4rl.spec.task import Problem, Task


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


Again = Callable[[evidence.Profile, Injection | None, Callable[[], Answered]], Answered]
"""From a profile, its injection, and what answers under it, to the answers: those of an earlier time, or new ones."""


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
        again: Again = lambda _profile, _injection, answered: answered(),
    ) -> Iterator[Evaluation]:
        """Load `folder` and answer all problems once per profile; `record` gets the evidence of what was rounded.

        `on_items` is called with (profile, done, all). `again` may give answers of an earlier time. Raises CheckFailed
        for sites that were never called while answering, and for changed master weights; NotFinite for logits that are
        no numbers.
        """
        model, tokenizer = load_saved(folder, dtype, self.lora, self.experts)
        for name, precision in self.precisions(last=last).items():
            with (
                weights_unchanged(model, "evaluation", step, record, profile=name),
                _injected(model, precision.injection) as attachment,
            ):
                profile = self._profile(name, precision, attachment)
                answered = partial(self._answered, (model, tokenizer), attachment, name, on_items)
                items, lines, far = again(profile, precision.injection, answered)
                for line in lines:
                    record(line.extended(profile=name, step=step))
            yield Evaluation(step, last, profile, items, far)

    def _answered(
        self,
        policy: tuple[PreTrainedModel, PreTrainedTokenizerBase],
        attachment: Attachment | None,
        name: str,
        on_items: Callable[[str, int, int], None],
    ) -> Answered:
        sampler, far = sampler_named(self.rollout), None
        kept, on_batch = Kept(sampler) if self.spec.kl else None, partial(on_items, name)
        with located(f"evaluation as {name}"):
            items = answer(*policy, self.problems, self.task.score, self.spec, on_batch, kept or sampler)
        items = tuple(replace(item, read=self.task.extracted(item.completion)) for item in items)
        lines: list[evidence.Evidence] = [*evidence_of(sampler)]
        if attachment is not None:  # evidence: what should have acted meanwhile, and what did
            attachment.require_calls()
            points = attachment.table.active_sites("evaluation")
            lines += [evidence.ActivePoints(phase="evaluation", points=points), rounded(attachment, 0)]
            lines += attachment.evidence()
        if kept is not None:
            far = divergence(policy[0], attachment, kept.rows, self.spec.batch_size, partial(on_items, f"{name}, KL"))
        return Answered(items, tuple(lines), far)

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
