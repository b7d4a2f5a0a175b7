"""Execute one planned run into its folder; this is what a worker process does.

A folder without `result.json` is an unfinished run. It resumes from its newest good checkpoint, and everything logged
after that is dropped; without a checkpoint it starts over from its seed. Either way it ends in the same numbers as a
run that was never interrupted. A folder with a result is never changed.
"""

import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import yaml

from fp4rl.lab.files import Damaged, remove_partial
from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.guards import crashes_logged, failure_kept, full_disk_named, locked
from fp4rl.lab.heartbeat import Heartbeat, beating
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.profile import WHAT
from fp4rl.lab.provenance import code_digest, versions
from fp4rl.lab.sinks import Sinks
from fp4rl.lab.spec_warnings import spec_warnings
from fp4rl.lab.stages import stages_of
from fp4rl.rl import events, processes
from fp4rl.rl.check import check
from fp4rl.rl.checkpoints import all_of, newest, remove
from fp4rl.rl.components import require_own_engine
from fp4rl.rl.inputs import Shelf
from fp4rl.rl.session import ResumeState
from fp4rl.rl.train import Trained, train
from fp4rl.spec.errors import require_finite
from fp4rl.spec.evidence import CheckpointKept, Evaluation, Evidence, Warned
from fp4rl.spec.frozen import Record
from fp4rl.spec.records import VERSION, RunResult
from fp4rl.spec.training import Training

_FILES = ("evidence.jsonl", "metrics.jsonl", "rollouts.jsonl", "sites.json", "log.txt")
_FOLDERS = ("items", "checkpoints", "on-the-way", "final", "tensorboard")


def execute_run(
    run: PlannedRun,
    root: Path,
    emit: events.Emit = events.ignore,
    report_to: Sequence[str] = (),
    interrupted: Callable[[], bool] = events.never,
) -> RunFolder:
    """Train and evaluate `run` below `root`; return its folder. A finished run is returned as it is.

    `report_to` names sinks besides TensorBoard, which are not part of the experiment. Once `interrupted()` is true the
    run keeps a checkpoint after its present step and raises Interrupted.

    Raises what `stages_of` and `check` raise, before anything is written, and what `train` raises; the folder then
    holds everything up to that point and no `result.json`.
    """
    folder = run_folder(root, run.suite, run.run_id)
    if folder.finished:
        return folder
    require_own_engine(run.experiment)
    stages = stages_of(run, root)
    check(run.experiment, stages)
    stages = replace(stages, evaluations=Shelf(root / "evaluations", {"code": code_digest(), **versions()}))
    train_here = partial(train, run.experiment, folder.path, root / "models", stamp=code_digest(), stages=stages)
    if not processes.is_first():  # of several processes that train this run together the first writes the folder
        train_here(events.ignore, processes.from_first(ResumeState()))
        return folder
    steps = run.experiment.training.steps
    # A full disk is named within the sign of life, so that this tells it too, and around its first one.
    with full_disk_named(folder), locked(folder), beating(folder.path, steps) as heart, full_disk_named(folder):
        if folder.finished:
            return folder
        remove_partial(folder.path)
        resume = processes.from_first(_resume_state(folder))
        spec = run.experiment.model_dump(mode="json")
        folder.write_spec(yaml.safe_dump(spec, sort_keys=False))
        started, used = time.perf_counter(), time.process_time()
        log = folder.path / "log.txt"
        with (
            failure_kept(folder),
            full_disk_named(folder),
            crashes_logged(log),
            Sinks(folder, report_to, spec) as sinks,
        ):
            _log(folder, spec_warnings({run.arm: run.experiment}))
            trained = train_here(_kept(folder, sinks, heart, emit), resume, interrupted=interrupted)
            _log(folder, [f"{name} was left out from some step on: {why}" for name, why in sinks.failures.items()])
            taken = time.perf_counter() - started, time.process_time() - used
            result = _result(run, trained, folder.evaluations(), taken)
            require_finite("result", result.as_json())
            folder.write_result(result)
        _forget_interruptions(folder, run.experiment.training)
    return folder


def _resume_state(folder: RunFolder) -> ResumeState:
    """Return where to resume: after the newest good checkpoint, later logs dropped, or at the start."""
    checkpoints, lines = folder.path / "checkpoints", list[str]()
    checkpoint = newest(checkpoints, code_digest(), lines.append)
    _note_attempt(folder, checkpoint.step if checkpoint is not None else 0)
    if checkpoint is None or not folder.drop_evidence_after(checkpoint.step):
        for name in _FOLDERS:
            if (folder.path / name).is_dir():
                shutil.rmtree(folder.path / name)
        for name in _FILES:
            (folder.path / name).unlink(missing_ok=True)
        _log(folder, [*lines, "starting over from the seed"] if lines else [])
        return ResumeState()
    remove([path for step, path in all_of(checkpoints).items() if step > checkpoint.step])
    folder.drop_metrics_after(checkpoint.step)
    _log(folder, [*lines, f"resumed from the checkpoint after step {checkpoint.step}"])
    return ResumeState(checkpoint, folder.metrics(), checkpoint.state["rollbacks"])


def _note_attempt(folder: RunFolder, step: int) -> None:
    """Note that the run begins after `step`, and what it trained beyond in vain."""
    try:
        lost = [values for at, values in folder.metrics().items() if at > step]
    except Damaged:  # told where it is in the way
        lost = []
    seconds = sum(values.get(f"time/{name}_s", 0.0) for values in lost for name in WHAT)
    cpu_s, tokens = (
        sum(values[name] for values in lost) if all(name in values for values in lost) else None
        for name in ("time/cpu_s", "tokens/rollout")
    )
    folder.add_attempt(
        at=round(time.time(), 3),
        host=socket.gethostname(),
        pid=os.getpid(),
        after_step=step,
        repeats_steps=len(lost),
        repeats_s=round(seconds, 3),
        repeats_cpu_s=cpu_s,
        repeats_tokens=tokens,
    )


def _forget_interruptions(folder: RunFolder, recipe: Training) -> None:
    """Delete the checkpoints of a finished run that its spec does not keep."""
    checkpoints, every = folder.path / "checkpoints", recipe.save_freq
    complete = all_of(checkpoints)
    regular = [step for step in sorted(complete) if every and step % every == 0]
    remove([path for step, path in complete.items() if step not in regular[-recipe.save_total_limit :]])
    if not every:
        shutil.rmtree(checkpoints, ignore_errors=True)


def _kept(folder: RunFolder, sinks: Sinks, heart: Heartbeat, emit: events.Emit) -> events.Emit:
    """Return a function that writes events of a run into its folder, and passes those for display on to `emit`."""

    def keep(event: events.Event) -> None:
        heart.note(event)
        match event:
            case events.StepDone():
                folder.add_metrics(event.step, event.metrics)
                sinks.log(event.step, event.metrics)
            case events.Sampled():
                folder.add_rollouts(event.step, map(asdict, event.answers))
                return
            case events.Evaluated(evaluation):
                items = [asdict(item) for item in evaluation.items]
                folder.write_items(evaluation.step, evaluation.profile.name, items)
                folder.add_evidence(evaluation.summary())
            case events.SitesResolved():
                folder.write_sites(event.sites)
            case events.StepsDropped():
                _note_attempt(folder, event.step)
                folder.drop_metrics_after(event.step)
            case events.Message():
                _log(folder, [event.line])
                if event.log_only:
                    return
                folder.add_evidence(Warned(line=event.line))
            case Record():
                _record(folder, event)
        emit(event)

    return keep


def _record(folder: RunFolder, line: Evidence) -> None:
    content = line.as_json()
    what = (str(content[key]) for key in ("phase", "profile", "site", "point") if key in content)
    require_finite(f"evidence of {' '.join((line.kind, *what))}", content)
    folder.add_evidence(line)
    if isinstance(line, CheckpointKept):  # the checkpoint leads back to the lines above this one
        folder.make_durable()


def _log(folder: RunFolder, lines: Sequence[str]) -> None:
    if lines:
        with (folder.path / "log.txt").open("a", encoding="utf-8") as log:
            log.writelines(f"{line}\n" for line in lines)


def _result(
    run: PlannedRun, trained: Trained, evaluations: tuple[Evaluation, ...], taken: tuple[float, float]
) -> RunResult:
    result = RunResult(
        version=VERSION,
        run_id=run.run_id,
        suite=run.suite,
        arm=run.arm,
        seed=run.seed,
        spec_digest=run.spec_digest,
        code_digest=code_digest(),
        versions=versions(),
        evaluations=evaluations,
        evidence=trained.evidence.extended(processes=processes.count()),
        steps_asked=run.experiment.training.steps,
        steps_done=trained.steps_done,
        device=processes.device().type,
        wall_s=round(taken[0], 3),
        cpu_s=round(taken[1], 3),
    )
    result = result.extended(preflight="skipped") if run.unchecked else result
    return result if trained.stopped is None else result.extended(stopped=trained.stopped)
