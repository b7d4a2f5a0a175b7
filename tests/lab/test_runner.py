"""Suites carried out: what is finished stays, what failed does not stop the rest, and nobody runs a run twice."""

import fcntl
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from rich.console import Console

import fp4rl
from fp4rl.cli.display import Display
from fp4rl.cli.run import refuse_others
from fp4rl.engines.executors import processes
from fp4rl.engines.executors.processes import LocalPool
from fp4rl.lab import guards, sinks, work
from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import planned, single
from fp4rl.lab.provenance import changed_inputs, code_digest
from fp4rl.lab.runner import Outcome, archive_stale, run_all, split_finished, stale
from fp4rl.rl.events import StepDone
from fp4rl.rl.inputs import inputs
from fp4rl.rl.train import Trained
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.records import RunResult, Summary
from planted.records import line

SUITE = Suite.model_validate({"suite": "s", "arms": {"a": {}, "b": {"training": {"steps": 3}}}, "seeds": [0, 1]})
RUNS = planned(SUITE)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Training that takes no time: the names of what was trained, in order."""
    names = []

    def train(experiment, folder, cache, emit, past, **options):
        names.append(folder.name)
        emit(StepDone(1, {"loss": 0.5}))
        emit(line("master"))
        (folder / "config.json").write_text("{}")
        return Trained(folder, folder / "final", 1, Summary(masters_unchanged=True))

    monkeypatch.setattr(work, "train", train)
    return names


def in_process(runs, root, on_event):
    for run in runs:
        try:
            work.execute_run(run, root)
        except Exception as error:
            yield Outcome(run, str(error))
        else:
            yield Outcome(run)


def carry_out_all(root, runs=RUNS):
    return run_all(runs, root, in_process, lambda event: None, lambda outcome: None)


def test_seeds_come_before_arms_so_that_an_interrupted_suite_holds_whole_comparisons():
    assert [(run.arm, run.seed) for run in RUNS] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_finished_runs_are_skipped_and_not_touched(trained, tmp_path):
    carry_out_all(tmp_path)
    before = [(run_folder(tmp_path, r.suite, r.run_id).path / "result.json").stat().st_mtime_ns for r in RUNS]
    outcome = carry_out_all(tmp_path)
    after = [(run_folder(tmp_path, r.suite, r.run_id).path / "result.json").stat().st_mtime_ns for r in RUNS]
    assert (len(outcome.skipped), outcome.done, len(trained)) == (4, [], 4)
    assert before == after


def test_a_failed_run_does_not_stop_the_others_and_is_tried_again(trained, tmp_path, monkeypatch):
    real = work.train

    def failing(experiment, *rest, **words):
        if experiment.training.steps == 3:
            raise NotFoundError("the data is gone; put it back")
        return real(experiment, *rest, **words)

    monkeypatch.setattr(work, "train", failing)
    outcome = carry_out_all(tmp_path)
    assert [o.error for o in outcome.failed] == ["the data is gone; put it back"] * 2
    monkeypatch.setattr(work, "train", real)
    assert len(carry_out_all(tmp_path).done) == 2


def test_leftovers_of_an_unfinished_run_are_cleared_before_it_starts_over(trained, tmp_path):
    folder = run_folder(tmp_path, "s", RUNS[0].run_id)
    folder.add_metrics(1, {"loss": 9.0})
    folder.add_metrics(2, {"loss": 9.0})
    work.execute_run(RUNS[0], tmp_path)
    assert folder.metrics() == {1: {"loss": 0.5}}


def test_a_run_that_another_process_holds_is_left_alone(trained, tmp_path, monkeypatch):
    folder = run_folder(tmp_path, "s", RUNS[0].run_id)
    folder.path.mkdir(parents=True)
    monkeypatch.setattr(guards, "_PATIENCE_S", 0.0)
    with (folder.path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InvalidValueError, match="being run by another process"):
            work.execute_run(RUNS[0], tmp_path)
    assert trained == []


def test_the_result_names_what_made_it(trained, tmp_path):
    result = work.execute_run(RUNS[0], tmp_path).result()
    assert result.spec_digest == RUNS[0].spec_digest
    assert (result.arm, result.seed, result.steps_asked, result.steps_done) == ("a", 0, 30, 1)
    assert {"torch", "transformers", "trl", "fp4rl", "python"} <= set(result.versions)


def test_a_result_of_other_code_is_stale_and_is_set_aside_whole_before_a_rerun(trained, tmp_path):
    folder = work.execute_run(RUNS[0], tmp_path)
    assert stale(RUNS, tmp_path) == []
    file = folder.path / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "code_digest": "0" * 12}))
    assert stale(RUNS, tmp_path) == [RUNS[0]]
    archive_stale(stale(RUNS, tmp_path), tmp_path)
    assert split_finished(RUNS, tmp_path)[0] == []
    assert (tmp_path / "s" / "stale" / f"{RUNS[0].run_id}-{'0' * 12}" / "result.json").is_file()


def test_a_finished_run_whose_files_have_changed_is_neither_skipped_in_silence_nor_overwritten(trained, tmp_path):
    model, data = tmp_path / "model", tmp_path / "train.jsonl"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"these weights")
    data.write_text('{"question": "1 + 1?", "answer": "#### 2"}')
    described = {"model": {"path": str(model)}, "task": {"name": "gsm8k", "path": str(data)}}
    run = single(Experiment.model_validate(described), "s")
    folder = run_folder(tmp_path, "s", run.run_id)
    folder.write_result(RunResult(evidence=Summary(inputs=inputs(run.experiment, model)), code_digest=code_digest()))
    assert changed_inputs([run], tmp_path) == {}
    assert stale([run], tmp_path) == []
    (model / "model.safetensors").write_bytes(b"other weights")
    assert changed_inputs([run], tmp_path) == {run.run_id: ["start model"]}
    data.write_text('{"question": "1 + 1?", "answer": "#### 3"}')
    assert changed_inputs([run], tmp_path) == {run.run_id: ["problems", "start model"]}
    assert stale([run], tmp_path) == [run]
    with pytest.raises(InvalidValueError, match=r"was made from another problems and start model .* --rerun-stale"):
        refuse_others([run], tmp_path)


def test_the_digest_of_the_code_sees_compiled_kernels(tmp_path, monkeypatch):
    root = tmp_path / "fp4rl"
    shutil.copytree(Path(fp4rl.__file__).parent, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fp4rl, "__file__", str(root / "__init__.py"))
    try:
        code_digest.cache_clear()
        before = code_digest()
        kernel = next(root.rglob("*.c"))
        kernel.write_text(kernel.read_text() + "/* other arithmetic */")
        code_digest.cache_clear()
        assert code_digest() != before
    finally:
        code_digest.cache_clear()


def test_a_run_that_is_ended_at_a_judged_step_has_one_number_there(trained, tmp_path, monkeypatch):
    real = work.train

    def stopped(experiment, folder, cache, emit, past, **options):
        for last in (False, True):
            emit(line("evaluation", step=1, last=last))
        return real(experiment, folder, cache, emit, past, **options)

    monkeypatch.setattr(work, "train", stopped)
    folder = work.execute_run(RUNS[0], tmp_path)
    assert [(e.step, e.last) for e in folder.result().evaluations] == [(1, True)]


def test_a_place_that_cannot_be_written_is_one_line_with_the_cure(tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    with pytest.raises(InvalidValueError, match="give another place with --runs"):
        work.execute_run(RUNS[0], tmp_path / "runs")


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_own_run_alone(tmp_path):
    """The pool's own test: two runs that cannot start (no such data) and one process killed under way."""
    bad = Suite.model_validate(
        {"suite": "t", "arms": {"a": {"task": {"name": "gsm8k", "path": "/nowhere.jsonl"}}}, "seeds": [0, 1]}
    )
    outcomes = list(LocalPool(2)(planned(bad), tmp_path, lambda event: None))
    assert len(outcomes) == 2
    assert all("does not exist" in outcome.error for outcome in outcomes)


def test_a_failed_run_is_not_counted_as_finished(capsys):
    display = Display(RUNS[:3], Console(width=100))
    display.on_outcome(Outcome(RUNS[0], "its process died"))
    display.on_outcome(Outcome(RUNS[1]))
    assert "(1 of 3, 1 failed" in capsys.readouterr().out


class Recorded:
    """A sink that keeps what it is told."""

    told: ClassVar[list] = []

    def __init__(self, _, spec):
        self.told.append(("spec", spec["training"]["steps"]))

    def log(self, step, values):
        self.told.append((step, values))

    def close(self, **_):
        self.told.append("closed")


def test_a_run_reports_to_what_is_asked_and_its_spec_does_not_change_by_it(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sinks._BY_NAME, "wandb", Recorded)
    monkeypatch.setattr(sinks, "find_spec", lambda name: object())
    folder = work.execute_run(RUNS[0], tmp_path, report_to=("wandb",))
    assert Recorded.told == [("spec", 30), (1, {"loss": 0.5}), "closed"]
    assert folder.result().spec_digest == RUNS[0].spec_digest


def test_the_pool_hands_its_workers_what_to_report_to():
    orders = []
    worker = processes._Worker(SimpleNamespace(is_alive=lambda: True), SimpleNamespace(send=orders.append), 0)
    assert LocalPool(report_to=("mlflow",))._assigned(RUNS[0], Path("runs"), worker) is worker
    assert orders == [(RUNS[0], Path("runs"), ("mlflow",))]


def test_the_curves_of_a_run_are_in_tensorboard_too(trained, tmp_path):
    folder = work.execute_run(RUNS[0], tmp_path)
    assert list((folder.path / "tensorboard").glob("events.*"))
