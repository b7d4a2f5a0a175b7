"""Runs that begin with one model evaluate it once under a profile, and have the numbers of runs that did it all."""

import json
import threading
import time

import pytest
import torch

from fp4rl.inject.attach import attach
from fp4rl.lab.gaps import gaps
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.work import execute_run
from fp4rl.models.load import embedded_skeleton
from fp4rl.rl import evaluate
from fp4rl.rl.answered import Answered
from fp4rl.rl.evaluate import evaluation_runner
from fp4rl.rl.profiles import precision_named
from fp4rl.rl.reuse import facts, taken
from fp4rl.spec.evidence import Injected, Reused
from fp4rl.spec.load import merge
from fp4rl.spec.model import Embedded

SHORT = {"training": {"steps": 1}, "evaluation": {"count": 12, "profiles": ["full", "deployment"], "samples": 2}}


@pytest.fixture
def carried(model_cache, tmp_path, experiment, monkeypatch):
    """`carried(root, arm, seed)` -> the folder of its run below `root`, and how often a policy answered meanwhile."""
    answers = evaluate.answer

    def go(root, arm, seed):
        torch.set_num_threads(1)
        (tmp_path / root).mkdir(exist_ok=True)
        if not (tmp_path / root / "models").exists():
            (tmp_path / root / "models").symlink_to(model_cache)
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "answer", lambda *args: calls.append(1) or answers(*args))
            folder = execute_run(PlannedRun("trial", arm, seed, experiment(arm, seed=seed, **SHORT)), tmp_path / root)
        return folder, len(calls)

    return go


def told(folder):
    """All that a run leaves but for times, and that it took answers from another."""
    result = {k: v for k, v in folder.result().as_json().items() if k not in ("wall_s", "cpu_s")}
    items = {name: folder.items(*name).to_pylist() for name in folder.item_sets()}
    lines = [str(line) for line in folder.evidence() if not isinstance(line, Reused)]
    metrics = [{k: v for k, v in line.items() if "time/" not in k} for line in folder.metrics().values()]
    return json.dumps([result, lines, metrics, str(items)])


def test_a_start_is_evaluated_once_and_every_number_stays(carried, tmp_path):
    """Two profiles, at step 0 and at the last step: four evaluations a run. W4A4 shares `full` with BF16."""
    runs = [("bf16", 0), ("w4a4", 0), ("w4a4", 1)]
    together = [carried("together", *run) for run in runs]
    alone = [carried(f"alone-{number}", *run) for number, run in enumerate(runs)]
    assert [told(folder) for folder, _ in together] == [told(folder) for folder, _ in alone]
    # of bf16 `deployment` rounds nothing, so that it is `full` under another name
    assert [calls for _, calls in together] == [3, 3, 2]
    assert [calls for _, calls in alone] == [3, 4, 4]
    reused = [[line.profile for line in folder.evidence() if isinstance(line, Reused)] for folder, _ in together]
    assert reused == [["deployment"], ["full"], ["full", "deployment"]]
    last, _ = together[2]
    assert gaps(last.spec(), last.result().evidence, last.evidence()) == ()
    assert sum(
        isinstance(line, Injected) and (line.profile, line.step) == ("deployment", 0) for line in last.evidence()
    )
    entries = {path.stem for path in (tmp_path / "together/evaluations").glob("*.json")}
    assert entries == {line.entry for folder, _ in together for line in folder.evidence() if isinstance(line, Reused)}


@pytest.mark.parametrize("damage", [lambda text: text[:-200], lambda text: text.replace('"length": 6', '"length": 5')])
def test_a_damaged_entry_is_made_again_and_that_is_logged(carried, tmp_path, damage):
    before, _ = carried("root", "w4a4", 0)
    entries = sorted((tmp_path / "root/evaluations").glob("*.json"))
    assert len(entries) == 2
    kept = [path.read_text() for path in entries]
    for path, text in zip(entries, kept, strict=True):
        assert damage(text) != text
        path.write_text(damage(text))
    after, calls = carried("root", "w4a4", 1)
    assert calls == 4
    assert [path.read_text() for path in entries] == kept
    assert (after.path / "log.txt").read_text().count("is damaged (") == 2
    assert [str(line.answers_digest) for line in before.evaluations()[:2]] == [
        str(line.answers_digest) for line in after.evaluations()[:2]
    ]


@pytest.fixture
def described(experiment):
    """`described(changes, start)` -> the facts of the evaluation as deployed."""

    def facts_of(changes=None, start="aaaa"):
        own = experiment("w4a4", **merge(SHORT, changes or {}))
        runner = evaluation_runner(own)
        precision = precision_named("deployment", runner.spec, own.injection)
        with attach(embedded_skeleton(Embedded()), precision.injection) as attachment:
            profile = runner._profile("deployment", precision, attachment)
        return facts((start, own.model.dtype), runner, profile, precision.injection)

    return facts_of


@pytest.mark.parametrize(
    "changes",
    [
        {"injection": {"mode": "w4a8"}},
        {"injection": {"seed": 1}},
        {"injection": {"by_pattern": {"*q_proj": "mxfp8", "*k_proj": "mxfp8", "*v_proj": "mxfp8"}}},
        {"model": {"dtype": "bfloat16"}},
        {"task": {"difficulty": 3}},
        {"evaluation": {"count": 11}},
        {"evaluation": {"batch_size": 3}},
        {"evaluation": {"max_new_tokens": 5}},
        {"evaluation": {"samples": 3}},
        {"evaluation": {"temperature": 0.5}},
        {"evaluation": {"seed": 1}},
        {"evaluation": {"kl": True}},
        {"evaluation": {"stop": ["x"]}},
    ],
    ids=str,
)
def test_whatever_can_change_a_number_makes_another_entry(described, changes):
    assert described() == described()
    assert described(changes) != described()


def test_another_start_makes_another_entry_and_what_acts_in_training_alone_none(described):
    assert described(start="bbbb") != described()
    schedule = {"schedule": {"input": {"from_step": 1}}}
    for changes in ({"injection": {"straight_through": "clipped"} | schedule}, {"training": {"lr": 1.0}}, {"seed": 3}):
        assert described(changes) == described()


def test_of_two_that_need_it_at_once_the_second_waits(tmp_path):
    made, waits, results = [], [], []

    def slowly():
        made.append(1)
        time.sleep(1.5)
        return Answered((), (), None)

    def need():
        results.append(taken(tmp_path, {"model": "m"}, "full", slowly, (lambda: waits.append(1), lambda _: None)))

    threads = [threading.Thread(target=need) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert waits
    assert results == [Answered((), (), None)] * 2
