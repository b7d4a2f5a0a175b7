"""What is the same in all training sessions of a run: its description, its folders, how it is judged and reported."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from fp4rl.rl import processes
from fp4rl.rl.answered import Answered, Evaluation
from fp4rl.rl.checkpoints import all_of
from fp4rl.rl.evaluate import Again, EvaluationRunner, choosing_runner, evaluation_runner
from fp4rl.rl.events import Emit, Evaluated, Interrupted, Progress, never
from fp4rl.rl.inputs import Shelf
from fp4rl.rl.reuse import facts, taken
from fp4rl.spec.errors import located
from fp4rl.spec.evidence import Profile
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection


@dataclass(frozen=True)
class Run:
    """What is the same in all sessions of a run. `stamp` names the code that writes checkpoints; `inputs` are digests
    of what the description points to, `teacher` the folder of one that is neither the start nor the live model."""

    experiment: Experiment
    folder: Path
    start: Path
    emit: Emit
    stamp: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    interrupted: Callable[[], bool] = never
    teacher: Path | None = None
    shelf: Shelf | None = None

    @cached_property
    def runner(self) -> EvaluationRunner:
        """The evaluation of the start, of the model during training, and of the final model."""
        return evaluation_runner(self.experiment)

    @cached_property
    def chooser(self) -> EvaluationRunner:
        """The evaluation by which the best step is chosen."""
        return choosing_runner(self.experiment)

    def choice(self, folder: Path, step: int) -> float:
        """Return the accuracy by which the best step is chosen: on the validation split, as deployed. In the first
        process; 0 in the others."""
        if not processes.is_first():
            return 0.0
        (evaluation,) = self.chooser.run(folder, self.experiment.model.dtype, step, last=False)
        return evaluation.share("strict")

    def evaluated(self, folder: Path, step: int, *, last: bool = False) -> Iterator[Evaluation]:
        """Yield every profile's evaluation of the model in `folder`: in the first process, and the others wait."""
        yield from self.judged(folder, step, last=last)
        processes.wait()

    def judged(self, folder: Path, step: int, *, last: bool = False) -> Iterator[Evaluation]:
        """Yield what `evaluated` does, and let the other processes go on."""

        def on_items(name: str, done: int, total: int) -> None:
            self.emit(Progress(f"eval {name}", done, total))
            if (last or step == 0) and self.interrupted():  # during training the step is finished and kept first
                then = "goes on from the last checkpoint" if all_of(self.folder / "checkpoints") else "starts it again"
                raise Interrupted(f"while step {step} was evaluated; the same command {then}")

        if processes.is_first():
            with located(f"after step {step}"):
                dtype, known = self.experiment.model.dtype, self._known(on_items) if step == 0 else {}
                for evaluation in self.runner.run(folder, dtype, step, last, on_items, self.emit, **known):
                    self.emit(Evaluated(evaluation))
                    yield evaluation

    def _known(self, on_items: Callable[[str, int, int], None]) -> dict[str, Again]:
        """Return what gives the answers of the start where another run has made them."""
        if (shelf := self.shelf) is None or self.experiment.rollout.engine != "transformers":
            return {}

        def again(profile: Profile, injection: Injection | None, answered: Callable[[], Answered]) -> Answered:
            if injection is not None and any(error.kind == "jitter" for error in injection.errors):
                return answered()  # they differ each time
            model = self.inputs["start model"], self.experiment.model.dtype
            described = facts(model, self.runner, profile, injection) | {"origin": dict(shelf.origin)}
            waiting = partial(on_items, profile.name, 0, len(self.runner.problems))
            return taken(shelf.folder, described, profile.name, answered, (waiting, self.emit))

        return {"again": again}
