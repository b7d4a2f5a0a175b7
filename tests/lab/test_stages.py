"""Runs that start from what other runs trained: in their order, by content, and never from what is not finished."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fp4rl.cli.main import entry, main
from fp4rl.engines.executors.processes import LocalPool
from fp4rl.lab.agenda import Agenda
from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import PlannedRun, planned
from fp4rl.lab.provenance import changed_inputs
from fp4rl.lab.runner import Outcome, run_all, stale
from fp4rl.lab.runs import read_run
from fp4rl.lab.stages import at_start, require_sources
from fp4rl.lab.work import execute_run
from fp4rl.rl import session as session_room
from fp4rl.rl import train as train_room
from fp4rl.rl.trainer import Trainer
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.experiment import Suite
from fp4rl.spec.transforms import Transformed
from planted.small import SMALL

SUITE = {
    "suite": "staged",
    "seeds": [0, 1],
    "base": SMALL | {"evaluation": {"count": 8, "max_new_tokens": 6}},
    "arms": {
        "qad": {
            "start": {"arm": "bf16"},
            "injection": "w4a4",
            "training": {"save_freq": 1, "distillation": {"teacher": {"arm": "other"}}},
        },
        "bf16": {"evaluation": {"profiles": ["full"]}},
        "other": {"training": {"lr": 1e-3}, "evaluation": {"profiles": ["full"]}},
    },
}


class Killed(BaseException):
    """Like a kill: nothing catches it."""


def chained(*needs):
    """Runs 0, 1, ...: each needs those before it that are named."""
    return [
        PlannedRun("s", f"a{number}", 0, SimpleNamespace(), {str(i): f"a{i}" for i in own})
        for number, own in enumerate(needs)
    ]


@pytest.fixture
def by_arm(monkeypatch):
    monkeypatch.setattr(PlannedRun, "run_id", property(lambda run: run.arm))


GRAPHS = st.lists(st.sets(st.integers(0, 9)), min_size=1, max_size=8).map(
    lambda rows: [sorted(i for i in row if i < number) for number, row in enumerate(rows)]
)


@given(GRAPHS, st.integers(1, 4), st.randoms(use_true_random=False), st.sets(st.integers(0, 7)))
def test_every_run_begins_behind_what_it_needs_or_says_why_not(needs, workers, random, failing):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlannedRun, "run_id", property(lambda run: run.arm))
        runs = chained(*needs)
        agenda, under_way, done, told = Agenda(runs), [], set(), {}
        while True:
            while len(under_way) < workers and (run := agenda.take()) is not None:
                assert set(run.needs.values()) <= done
                under_way.append(run)
            if not under_way:
                break
            run = under_way.pop(random.randrange(len(under_way)))
            failed = int(run.arm[1:]) in failing
            done |= set() if failed else {run.run_id}
            outcome = Outcome(run, "it broke" if failed else None)
            for each in [outcome, *agenda.ended(outcome)]:
                assert told.setdefault(each.run.run_id, each.error) is each.error  # each run once
        assert not agenda
        assert set(told) == {run.run_id for run in runs}
        lost = set()
        for number, own in enumerate(needs):
            if number in failing or lost & set(own):
                lost.add(number)
            blocked = bool((lost - {number}) & set(own))
            assert (told[f"a{number}"] or "").startswith("not begun") is blocked


def test_a_run_whose_start_failed_says_which_and_why(by_arm):
    runs = chained([], [0], [1])
    agenda = Agenda(runs)
    assert agenda.take() is runs[0]
    assert agenda.take() is None
    assert [(each.run.arm, each.error) for each in agenda.ended(Outcome(runs[0], "no disk"))] == [
        ("a1", "not begun: 0 a0 failed (no disk)"),
        ("a2", "not begun: 1 a1 failed (not begun: 0 a0 failed (no disk))"),
    ]


@pytest.fixture
def staged(tmp_path, model_cache):
    """`staged(**changes)` -> the runs of the first seed by arm, and where they go."""
    (tmp_path / "models").symlink_to(model_cache)
    torch.set_num_threads(1)

    def runs(**changes):
        suite = Suite.model_validate(SUITE | changes)
        return {run.arm: run for run in planned(suite) if run.seed == 0}

    return runs


@pytest.fixture(scope="session")
def model_cache(shared_tmp):
    folder = shared_tmp / "models-of-rl"
    folder.mkdir(exist_ok=True)
    return folder


def weights(folder):
    return load_file(folder.path / "final/model.safetensors")


def test_a_run_begins_with_the_bits_of_its_start_and_learns_from_its_teacher(staged, tmp_path, monkeypatch):
    runs, seen = staged(), {}
    folders = {arm: execute_run(runs[arm], tmp_path) for arm in ("bf16", "other")}
    real_check, real_taught = train_room.require_verifiable, session_room.reference_and_teacher

    def check(experiment, model, attachment, start):
        seen["student"] = {name: weight.clone() for name, weight in model.state_dict().items()}
        return real_check(experiment, model, attachment, start)

    def taught(*args):
        reference, teacher = real_taught(*args)
        seen["teacher"] = teacher.model.state_dict()
        return reference, teacher

    monkeypatch.setattr(train_room, "require_verifiable", check)
    monkeypatch.setattr(session_room, "reference_and_teacher", taught)
    result = execute_run(runs["qad"], tmp_path).result()
    for who, arm in (("student", "bf16"), ("teacher", "other")):
        stored = weights(folders[arm])
        assert stored
        assert all(torch.equal(seen[who][name], weight) for name, weight in stored.items())
    assert not torch.equal(
        weights(folders["bf16"])["model.norm.weight"], weights(folders["other"])["model.norm.weight"]
    )
    recorded = result.evidence.inputs
    assert recorded["start model"] == folders["bf16"].result().evidence.final_files
    assert recorded["teacher"] == folders["other"].result().evidence.final_files
    first = {e.profile.name: e.answers_digest for e in result.evaluations if e.step == 0}
    ended = {e.profile.name: e.answers_digest for e in folders["bf16"].result().evaluations if e.last}
    assert first["full"] == ended["full"]


def remade(folder):
    """Train the run of `folder` again, as it were: other weights, and a result that says so."""
    from fp4rl.rl.inputs import of_model

    file = folder.path / "final/model.safetensors"
    save_file({name: weight * 1.01 for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    result = folder.path / "result.json"
    content = json.loads(result.read_text())
    content["evidence"]["final_files"] = of_model(folder.path / "final")
    result.write_text(json.dumps(content))


def test_a_start_that_has_changed_is_refused_at_resume_and_beside_a_finished_run(staged, tmp_path, monkeypatch):
    runs = staged()
    start, other = (execute_run(runs[arm], tmp_path) for arm in ("bf16", "other"))
    before, file = weights(start), start.path / "final/model.safetensors"
    with monkeypatch.context() as patch:
        sample = Trainer._sample
        patch.setattr(Trainer, "_sample", lambda self, p: _killed() if self.step == 1 else sample(self, p))
        with pytest.raises(Killed):
            execute_run(runs["qad"], tmp_path)
    save_file({name: weight * 1.01 for name, weight in before.items()}, file, metadata={"format": "pt"})
    with pytest.raises(
        InvalidValueError, match=r"start: .*final does not hold the weights that staged/bf16-s0-\w+ end"
    ):
        execute_run(runs["qad"], tmp_path)
    save_file(before, file, metadata={"format": "pt"})
    kept = (start.path / "result.json").read_text()
    remade(start)
    with pytest.raises(InvalidValueError, match=r"after step 1 was written: start model \(model or start\)"):
        execute_run(runs["qad"], tmp_path)
    save_file(before, file, metadata={"format": "pt"})
    (start.path / "result.json").write_text(kept)
    folder = execute_run(runs["qad"], tmp_path)
    assert "resumed from the checkpoint after step 1" in (folder.path / "log.txt").read_text()
    assert changed_inputs([runs["qad"]], tmp_path) == {}
    remade(other)
    assert changed_inputs([runs["qad"]], tmp_path) == {runs["qad"].run_id: ["teacher"]}
    assert stale(list(runs.values()), tmp_path) == [runs["qad"]]
    (start.path / "result.json").write_text(kept.replace('"code_digest": "', '"code_digest": "0'))
    assert stale(list(runs.values()), tmp_path) == [runs["bf16"], runs["qad"]]  # what starts from it goes with it


def _killed():
    raise Killed


def described(folder):
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    return folder / "suite.yaml"


def test_an_arm_is_measured_in_the_weights_that_it_starts_from(staged, tmp_path, capsys):
    """Kind: a scan or reward of a later stage that measures the base model and does not say so."""
    runs = staged()
    final = execute_run(runs["bf16"], tmp_path).path / "final"
    assert at_start(runs["qad"], tmp_path).model.path == str(final)
    assert at_start(runs["other"], tmp_path) == runs["other"].experiment

    def errors(*words):
        assert main(["scan", *map(str, words), "parts=precision", "--json", "--runs", str(tmp_path)]) == 0
        return [
            row["measures"]["relative_l2"]
            for row in json.loads(capsys.readouterr().out)["parts"]
            if row["part"] == "weight"
        ]

    suite = described(tmp_path)
    started, changed = errors(suite, "arm=qad"), errors(suite, "arm=bf16", "injection=w4a4")
    assert started == errors(final, "injection=w4a4") != changed
    wider = errors(suite, "arm=qad", "injection.by_pattern={'*.down_proj': mxfp8}")
    assert (wider[:6], wider[6] < started[6] / 2) == (started[:6], True)
    assert main(["reward", str(suite), "--arm", "qad", "--sample", "3", "--json", "--runs", str(tmp_path)]) == 0
    of_stage = json.loads(capsys.readouterr().out)["answers"]
    model = {"path": str(final), "dtype": runs["qad"].experiment.model.dtype}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(SUITE["base"] | {"model": model}))
    assert main(["reward", str(tmp_path / "own.yaml"), "--sample", "3", "--json", "--runs", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == of_stage


def test_nothing_starts_from_a_run_that_is_missing_unfinished_or_ended_early(staged, tmp_path, capsys):
    runs = staged()
    with pytest.raises(NotFoundError, match=r"start: staged/bf16-s0-\w+ is not finished; run it too \(--arm bf16\)"):
        require_sources([runs["qad"], runs["other"]], tmp_path)
    require_sources(list(runs.values()), tmp_path)
    with pytest.raises(NotFoundError, match=r"no result.json: the run is not finished"):
        execute_run(runs["qad"], tmp_path)
    for verb in (["scan", "parts=precision", "arm=qad"], ["reward", "--arm", "qad", "--sample", "2"]):
        assert main([verb[0], str(described(tmp_path)), *verb[1:], "--runs", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "arm qad starts from staged/bf16-s0-" in said
        assert "run it first (fp4rl run SPEC --arm bf16 --seed 0)" in said
    start = execute_run(runs["bf16"], tmp_path)
    result = json.loads((start.path / "result.json").read_text())
    (start.path / "result.json").write_text(json.dumps(result | {"stopped": "entropy fell"}))
    with pytest.raises(InvalidValueError, match=r"was ended early \(entropy fell\)"):
        execute_run(runs["qad"], tmp_path)


def test_a_start_is_a_run_by_its_key_or_its_folder(staged, tmp_path):
    start = execute_run(staged()["bf16"], tmp_path)
    for name in (start.key, str(start.path)):
        arms = {"on": {"start": {"run": name}}}
        run = staged(arms=arms, suite="later")["on"]
        assert execute_run(run, tmp_path).result().evidence.inputs["start model"] == (
            start.result().evidence.final_files
        )
    for name, why in (("staged/bf16-s0", "write suite/run-id"), ("nowhere", "no run below")):
        with pytest.raises(NotFoundError, match=why):
            execute_run(staged(arms={"on": {"start": {"run": name}}}, suite="later")["on"], tmp_path)
    other = {"model": {"embedded": {"warm_up_steps": 61}}, "start": {"run": start.key}}
    with pytest.raises(InvalidValueError, match="built from another model"):
        execute_run(staged(arms={"on": other}, suite="later")["on"], tmp_path)


def test_a_teacher_with_other_tokens_is_refused(staged, tmp_path, model_cache):
    from fp4rl.models.tiny import build
    from fp4rl.models.tokenizer import build_tokenizer
    from fp4rl.spec.model import Embedded

    model, tokenizer = build(Embedded(), build_tokenizer()), build_tokenizer()
    tokenizer.add_tokens(["<other>"])
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    teacher = {"training": {"distillation": {"teacher": {"path": str(tmp_path / "teacher")}}}}
    with pytest.raises(InvalidValueError, match=r"teacher: .*teacher has another vocabulary"):
        execute_run(staged(arms={"a": teacher})["a"], tmp_path)


@pytest.mark.slow
def test_a_suite_of_stages_is_carried_out_by_the_command_line_whatever_fails(tmp_path, model_cache, capsys):
    """Two workers and stages three deep; the start of one chain fails, and its followers say so."""
    (tmp_path / "models").symlink_to(model_cache)
    arms = SUITE["arms"] | {
        "third": {"start": {"arm": "qad"}, "injection": "w4a4"},
        "broken": {"model": {"lora": {"target_modules": ["no_such"]}}},
        "behind": {"start": {"arm": "broken"}},
    }
    suite = Suite.model_validate(SUITE | {"arms": arms})
    order, told = [], {}
    outcome = run_all(
        planned(suite),
        tmp_path,
        LocalPool(2),
        lambda event: order.append(event.run_id),
        lambda o: told.update({o.run.arm: o}),
    )
    began = [run_id.rpartition("-")[0] for run_id in dict.fromkeys(order) if run_id]
    for seed in (0, 1):
        assert began.index(f"bf16-s{seed}") < began.index(f"qad-s{seed}") < began.index(f"third-s{seed}")
    assert len(outcome.done) == 8
    assert {each.run.arm for each in outcome.failed} == {"broken", "behind"}
    assert "no layer 'no_such'" in told["broken"].error
    assert told["behind"].error.startswith("not begun: start broken-s")
    assert not any(run_folder(tmp_path, "staged", each.run.run_id).path.exists() for each in outcome.failed)

    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(SUITE | {"arms": {"third": arms["third"], **SUITE["arms"]}}))
    with pytest.raises(SystemExit) as ended:
        entry_with("run", str(file), "--runs", str(tmp_path))
    assert not ended.value.code
    assert "8 of 8 runs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        entry_with("plan", str(file), "--runs", str(tmp_path), "--json")
    rows = {row["arm"]: row for row in json.loads(capsys.readouterr().out)}
    assert {arm: row["total_steps"] for arm, row in rows.items()} == {"bf16": 2, "other": 2, "qad": 6, "third": 8}
    assert rows["third"]["needs"] == {"start": rows["qad"]["run_id"]}
    with pytest.raises(SystemExit) as ended:
        entry_with("run", str(file), "--runs", str(tmp_path / "elsewhere"), "--arm", "qad")
    assert ended.value.code == 2
    assert "run it too (--arm bf16)" in capsys.readouterr().err


def entry_with(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fp4rl", *words])
        entry()


TURNED = [{"name": "rotate_residual"}]


def test_what_is_transformed_is_not_transformed_again_and_a_start_is_transformed_where_it_was_not(staged, tmp_path):
    arms = {
        "plain": {},
        "turned": {"model.transforms": TURNED},
        "on": {"start": {"arm": "turned"}, "model.transforms": TURNED},
        "later": {"start": {"arm": "plain"}, "model.transforms": TURNED},
    }
    runs = staged(arms=arms)
    folders = {arm: execute_run(runs[arm], tmp_path) for arm in arms}
    read = {arm: read_run(folder) for arm, folder in folders.items()}
    lines = {arm: own.of(Transformed) for arm, own in read.items()}
    inputs = {arm: folder.result().evidence.inputs for arm, folder in folders.items()}
    assert lines["plain"] == []
    assert [lines[arm][0].difference is None for arm in ("turned", "on", "later")] == [False, True, False]
    assert inputs["on"]["start model"] == folders["turned"].result().evidence.final_files
    assert inputs["later"]["untransformed model"] == folders["plain"].result().evidence.final_files
    assert not any(own.gaps for own in read.values())
    assert changed_inputs(list(runs.values()), tmp_path) == {}
    remade(folders["plain"])
    assert changed_inputs(list(runs.values()), tmp_path) == {runs["later"].run_id: ["untransformed model"]}


@pytest.mark.parametrize("own", [[], ["rotate_heads"]])
def test_a_start_that_went_through_other_transforms_is_refused(staged, own):
    arms = {"turned": {"model.transforms": TURNED}, "on": {"start": {"arm": "turned"}, "model.transforms": own}}
    with pytest.raises(InvalidValueError, match=r"start.arm turned: its weights went through its model.transforms"):
        staged(arms=arms)
