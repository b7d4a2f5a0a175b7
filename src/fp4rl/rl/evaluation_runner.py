"""Evaluate a saved model under every profile of an experiment: what is evaluated is what was written to disk."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from fp4rl.inject.attach import Attachment, attach
from fp4rl.inject.label import label
from fp4rl.models.load import load, with_lora
from fp4rl.rl import processes
from fp4rl.rl.evaluate import Decoding, Evaluation, answer, items_digest
from fp4rl.rl.generate import sampler_named
from fp4rl.rl.profiles import Precision, precision_named
from fp4rl.rl.verify import Record, acting, rounded, weights_unchanged
from fp4rl.spec.evaluation import Evaluation as EvaluationSpec
from fp4rl.spec.evidence import Evidence, Profile
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Lora
from fp4rl.spec.task import Problem, Task

OnItems = Callable[[str, int, int], None]


def _ignore(_: Evidence) -> None:
    return


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
    seed: int = 0
    lora: Lora | None = None
    sampler: str = "transformers"

    def precisions(self, *, last: bool = True) -> dict[str, Precision]:
        """Profile name -> what is injected while it is measured; the robustness sweep belongs to the `last` step.

        Raises NotFoundError for a profile that no precision is called by.
        """
        names = [*self.spec.profiles, *(self.spec.sweep if last else ())]
        return {name: precision_named(name, self.spec, self.injection) for name in names}

    def run(
        self,
        folder: Path,
        dtype: str,
        step: int,
        last: bool,
        on_items: OnItems | None = None,
        record: Record = _ignore,
    ) -> Iterator[Evaluation]:
        """Load `folder` afresh and answer all problems once per profile; `record` hears what was rounded meanwhile.

        Raises CheckFailed for sites that were never called while the answers were made, and for changed master weights.
        """
        model, tokenizer = load(folder, dtype)
        if self.lora is not None and not (folder / "adapter_config.json").is_file():
            model = with_lora(model, self.lora, folder).eval()
        model.to(processes.device())
        sampler = sampler_named(self.sampler)
        for name, precision in self.precisions(last=last).items():

            def on_answered(done: int, total: int, name: str = name) -> None:
                if on_items is not None:
                    on_items(name, done, total)

            with (
                weights_unchanged(model, "evaluation", step, record, profile=name),
                _injected(model, precision.injection) as attachment,
            ):
                items = answer(model, tokenizer, self.problems, self.task.score, self.decoding, on_answered, sampler)
                for row in _verified(attachment, step, name):
                    record(row)
            yield Evaluation(step, last, self._profile(name, precision, attachment), items)

    @property
    def decoding(self) -> Decoding:
        """How answers are generated."""
        spec = self.spec
        return Decoding(
            spec.max_new_tokens, spec.batch_size, spec.samples, spec.temperature, self.seed, spec.stop or ()
        )

    def _profile(self, name: str, precision: Precision, attachment: Attachment | None) -> Profile:
        return Profile(
            name=name,
            precision=label(attachment.table if attachment is not None else None),
            sites_digest=_digest(attachment),
            noise=precision.noise,
            scorer=self.task.name,
            max_new_tokens=self.spec.max_new_tokens,
            sampling=self.decoding.name + (f", by {self.sampler}" if self.sampler != "transformers" else ""),
            items_digest=items_digest(self.problems),
        )


def evaluation_runner(experiment: Experiment, task: Task) -> EvaluationRunner:
    """Make the runner of an experiment, with its held-out problems."""
    spec = experiment.evaluation.for_task(experiment.task)
    problems = task.problems(spec.split, spec.count)
    return EvaluationRunner(
        spec, experiment.injection, task, problems, lora=experiment.model.lora, sampler=experiment.sampler
    )


@contextmanager
def _injected(model: PreTrainedModel, injection: Injection | None) -> Iterator[Attachment | None]:
    if injection is None:
        yield None
        return
    # Packed weights come back rounded, and the next profile would be measured on them; the numbers are the same.
    with attach(model, injection.model_copy(update={"frozen_base": "copy"})) as attachment:
        attachment.set_phase("evaluation")
        yield attachment


def _digest(attachment: Attachment | None) -> str | None:
    """Of the sites that act; None where none does, as under errors that stay out of evaluations: that is `full`."""
    if attachment is None or not attachment.table.acting("evaluation"):
        return None
    return attachment.table.digest_in("evaluation")


def _verified(attachment: Attachment | None, step: int, profile: str) -> Iterator[Evidence]:
    """What should have acted while the answers were made, and what did."""
    if attachment is None:
        return
    attachment.require_calls()
    yield acting(attachment, "evaluation", step, profile=profile)
    yield rounded(attachment, step, profile=profile)
    yield from (row.extended(profile=profile, step=step) for row in attachment.evidence())


def evaluate(folder: Path, experiment: Experiment) -> tuple[Evaluation, ...]:
    """Evaluate the model in `folder` as `experiment` would: its task, its held-out problems, every profile it names.

    Raises NotFoundError for a folder, a file or a profile that does not exist.
    """
    return tuple(
        evaluation_runner(experiment, experiment.task).run(
            folder, experiment.model.dtype, experiment.training.steps, True
        )
    )
