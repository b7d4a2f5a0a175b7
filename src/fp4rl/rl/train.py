"""One run from its description to its numbers: start, evaluate, train, save, evaluate the saved model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fp4rl.models.packed.as_served import packed_note
from fp4rl.models.transforms.note import note_of
from fp4rl.noise.warnings import noise_warnings, without_effect
from fp4rl.rl import processes
from fp4rl.rl.agreement import require_alike
from fp4rl.rl.check import check
from fp4rl.rl.checkpoints import Checkpoint, all_of, read, remove
from fp4rl.rl.clipping import clipping_rows, require_learned, unclamped
from fp4rl.rl.components import require_own_engine, require_processes
from fp4rl.rl.evaluate import items_digest
from fp4rl.rl.events import Emit, Interrupted, Message, Progress, SitesResolved, StepsDropped, ignore, never
from fp4rl.rl.health.monitor import last_healthy
from fp4rl.rl.inputs import ALONE, Stages, inputs, of_model, require_unchanged, start_folder, teacher_folder
from fp4rl.rl.oscillation import codes_unlike
from fp4rl.rl.problems import dropped
from fp4rl.rl.run import Run
from fp4rl.rl.session import ResumeState, TrainingSession, beginning
from fp4rl.rl.sharding import whole
from fp4rl.rl.verify import (
    few_changed,
    require_changed,
    require_sound_quantizer,
    require_verifiable,
    share_changed,
    sites,
    verify_final,
    weights_digest,
    without_update,
)
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.evidence import RolledBack
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.records import DeployedWeights, Summary
from fp4rl.spec.transforms import Transformed
from fp4rl.spec.words import counted


@dataclass(frozen=True)
class Trained:
    """The outcome of a run. `start` and `final` are the folders of the model before and after, `evidence` the summary
    in the result.

    `stopped`: why the monitor ended it early; None when it did not.
    """

    start: Path
    final: Path
    steps_done: int
    evidence: Summary
    stopped: str | None = None


def train(
    experiment: Experiment,
    folder: Path,
    cache: Path,
    emit: Emit = ignore,
    resume: ResumeState | None = None,
    *,
    interrupted: Callable[[], bool] = never,
    stamp: str = "",
    stages: Stages = ALONE,
) -> Trained:
    """Run one experiment; the trained model is written to `folder`/final, warmed-up models to `cache`.

    `resume` continues from a checkpoint in `folder`/checkpoints, with its metrics; step 0 is not evaluated again.
    `emit` gets every event; once `interrupted()` is true the run keeps a checkpoint and raises Interrupted. `stages`:
    what other runs have made and this one takes. Raises NotFoundError and InvalidValueError,
    before anything is trained, for anything in the experiment that cannot be used, and CheckFailed when the run's
    evidence contradicts its spec.
    """
    require_own_engine(experiment)
    check(experiment, stages)
    require_processes(experiment, processes.count())
    require_sound_quantizer()
    resume = resume or ResumeState()
    run = _run(experiment, folder, cache, emit, interrupted, stamp, stages)
    if (left_out := dropped(experiment)) is not None:
        run.emit(Message(left_out))
    if (packed := packed_note(run.start)) is not None:
        run.emit(Message(f"{packed}; masters start from the decoded values"))
    if resume.checkpoint is not None:
        _require_resumable(resume.checkpoint, run)
        session = TrainingSession(run, resume)
    else:
        if transforms := experiment.model.transforms:
            run.emit(note_of(run.start) or Transformed(transforms=tuple(t.model_dump(mode="json") for t in transforms)))
        list(run.evaluated(run.start, 0))
        session = TrainingSession(run, resume)
        require_verifiable(experiment, session.model, session.attachment, run.start)
    if experiment.noise is not None:
        with whole(session.model, session.attachment):
            warnings = [*noise_warnings(session.model, experiment.noise, experiment.training.steps)]
            if experiment.model.path is not None:  # for the embedded model it is known without loading
                warnings += without_effect(session.model, experiment.noise)
        for line in warnings:
            run.emit(Message(line))
    run.emit(SitesResolved(sites(session.attachment)))
    session.train()
    while session.monitor.verdict == "rollback" and resume.rollbacks < experiment.health.max_rollbacks:
        _roll_back(run, session)
        session = TrainingSession(run, resume)
        session.train()
    return _ended(run, session)


def _run(
    experiment: Experiment,
    folder: Path,
    cache: Path,
    emit: Emit,
    interrupted: Callable[[], bool],
    stamp: str,
    stages: Stages,
) -> Run:
    if not processes.is_first():  # only one process reports
        emit, interrupted = ignore, never
    embedded = experiment.model.embedded

    def warming(step: int, _: float) -> None:
        emit(Progress("warm-up", step, embedded.warm_up_steps if embedded else 0))
        if interrupted():
            raise Interrupted("in the warm-up, which starts over")

    # In turn: under a launcher transformers saves nothing in another process than the first, and says nothing.
    if processes.is_first():
        start_folder(experiment.model, experiment.task, cache, warming, stages)
    processes.wait()
    start = start_folder(experiment.model, experiment.task, cache, stages=stages)
    teacher = teacher_folder(experiment, stages)
    digests = processes.from_first(inputs(experiment, start, teacher))
    return Run(experiment, folder, start, emit, stamp, digests, interrupted, teacher, stages.evaluations)


def _require_resumable(checkpoint: Checkpoint, run: Run) -> None:
    """Raise InvalidValueError for a checkpoint of other inputs, or of another number of processes."""
    before = len(checkpoint.state["positions"])
    if before != processes.count():
        raise InvalidValueError(
            f"{checkpoint.path} was written by {before} processes and this is {processes.count()}: start as many, "
            "or delete the checkpoints"
        )
    require_unchanged(checkpoint.state["inputs"], run.inputs, checkpoint.step, run.folder / "checkpoints")


def _roll_back(run: Run, session: TrainingSession) -> None:
    """Go back to the newest checkpoint before the onset of the alarm, or to the start, with a lower learning rate."""
    resume, finding = session.resume, session.monitor.decisive
    if session.attachment is not None:
        session.attachment.remove()
    checkpoints, every = all_of(run.folder / "checkpoints"), run.experiment.training.save_freq
    # Checkpoints by the clock are not used: where a run goes back to must not depend on its speed.
    step = last_healthy([done for done in checkpoints if every and done % every == 0], session.monitor.alarms)
    resume.checkpoint = read(checkpoints[step], run.stamp)[0] if step is not None else None
    back = resume.checkpoint.step if resume.checkpoint is not None else 0
    processes.wait()  # until all have read the checkpoints
    if processes.is_first():
        remove([path for done, path in checkpoints.items() if done > back])
    processes.wait()
    resume.metrics = {done: metrics for done, metrics in resume.metrics.items() if done <= back}
    resume.rollbacks += 1
    lr = run.experiment.training.lr * run.experiment.health.rollback_lr**resume.rollbacks
    run.emit(StepsDropped(back))
    run.emit(RolledBack(step=session.trainer.step, to=back, lr=lr, why=str(finding)))
    run.emit(
        Message(f"rolled back from step {session.trainer.step} to step {back}, learning rate now {lr:g}: {finding}")
    )


def _ended(run: Run, session: TrainingSession) -> Trained:
    stopped = str(session.monitor.decisive) if session.monitor.decisive is not None else None
    if stopped is None:  # a run that ended early may not have reached its noisy stages
        session.phases.finish()
    for row in session.oscillation.rows() if session.oscillation is not None else ():
        run.emit(row)
    chosen = _deployed(run, session)
    final = session.save(run.folder / "final")
    masters, steps = session.trainer.masters, session.resume.metrics.values()
    share = share_changed(beginning(run), session.model, run.emit, unclamped(masters))
    clipped = list(clipping_rows(masters))
    for line in clipped:
        run.emit(line)
    if stopped is None:
        require_changed(share, steps, session.trainer.filler.metric, run.experiment.model.dtype)
        require_learned(clipped)
    hardly_moved = few_changed(share, run.experiment.model)
    if hardly_moved is not None:
        run.emit(Message(hardly_moved))
    evidence = verify_final(run.experiment, session.model, session.attachment, final, run.emit).extended(
        weights_changed=share,
        hardly_moved=hardly_moved,
        steps_without_update=without_update(steps),
        recipe=run.experiment.training.effective(),
        inputs=run.inputs,
        final_weights=weights_digest(session.model),
        final_files=processes.from_first(of_model(final) if processes.is_first() else None),
        noise=session.phases.noise_summary(),
        health=session.monitor.summary(session.resume.rollbacks),
    )
    if chosen is not None:
        evidence = evidence.extended(deployed=chosen)
    if processes.count() > 1:
        require_alike(f"{evidence.final_weights}, {evidence.noise}", "final weights, or their noise,")
    list(run.evaluated(final, session.trainer.step, last=True))
    return Trained(run.start, final, session.trainer.step, evidence, stopped)


def _deployed(run: Run, session: TrainingSession) -> DeployedWeights | None:
    """Put the weights that are to be deployed into the model; return which they are, None for the live ones at last."""
    recipe, best = run.experiment.training, session.deployed.best
    unlike = None
    if session.rounds_by_average and best is None and session.attachment is not None:
        unlike = codes_unlike(session.attachment, session.deployed, session.phases)
    session.deployed.deploy()
    if recipe.ema is None and recipe.deployed == "last":
        return None
    chosen = DeployedWeights(step=session.trainer.step, ema_decay=recipe.ema.decay if recipe.ema is not None else None)
    if best is None:
        return chosen if unlike is None else chosen.extended(codes_unlike=unlike)
    problems, profile = run.chooser.problems, run.chooser.spec.profiles[0]
    run.emit(
        Message(
            f"deployed: the policy after step {best.step}, the best on {counted(len(problems), 'validation problem')} "
            f"({best.score:.1%} as {profile})",
            log_only=True,
        )
    )
    return chosen.extended(step=best.step, score=best.score, profile=profile, problems=items_digest(problems))
