"""A finished verl run becomes a run of the ledger: here one whose record holds what a run of TRL did."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from fp4rl.cli.main import main as fp4rl
from fp4rl.engines.verl.imported import read_verl_run, saved_weights
from fp4rl.lab.folders import finished_runs
from fp4rl.lab.matrix import planned
from fp4rl.lab.runs import read_run
from fp4rl.lab.work import execute_run
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.evidence import Evaluation, Injected, LiveCheck, MasterCheck, RolloutNoise, WeightsMoved
from fp4rl.spec.experiment import Suite
from fp4rl.spec.records import ENGINE_METRICS, ENGINE_RUN, EngineRun

TINY = {
    "model": {"embedded": {"warm_up_steps": 2}},
    "injection": "w4a16",
    "training": {
        "algorithm": "grpo",
        "kl_loss_coef": 0.0,
        "reward": "short_answers.brevity",
        "steps": 2,
        "train_batch_size": 2,
        "rollout_n": 4,
        "mini_batch_size": 2,
        "max_response_length": 8,
    },
    "evaluation": {"count": 4, "profiles": ["full", "deployment"]},
}
QUESTION = {
    "question": "Do the engines agree?",
    "treatment": "verl@deployment",
    "control": "own@deployment",
    "factors": ["engine", "processes"],
}
SUITE = {"suite": "two", "seeds": [0], "base": TINY, "arms": {"own": {}, "verl": {"engine": "verl"}}}
BREVITY = "def brevity(*, completion, **_):\n    return -float(len(completion))\n"
MEASURED = (Evaluation, LiveCheck, WeightsMoved)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of TRL, in a suite that asks for one of verl too."""
    root = tmp_path_factory.mktemp("runs")
    suite = Suite.model_validate(SUITE | {"comparisons": [QUESTION]})
    (root.parent / "short_answers.py").write_text(BREVITY)
    (root / "two").mkdir()
    (root / "two" / "suite.yaml").write_text(yaml.safe_dump(suite.model_dump(mode="json")))
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(root.parent)
        return execute_run(planned(suite)[0], root)


def record_of(own, **changed):
    """What verl would record of the same training: no evaluation, and no check of what was saved."""
    run, result = read_run(own), own.result()
    lines = [line for line in run.lines if not isinstance(line, MEASURED) and getattr(line, "profile", None) is None]
    return EngineRun(
        engine="verl",
        spec={key: value for key, value in own.spec().items() if key != "engine"},
        seed=0,
        suite="two",
        arm="verl",
        code_digest=result.code_digest,
        versions={"torch": "2.11.0", "verl": "0.9.1"},
        steps_asked=2,
        steps_done=2,
        sites=run.sites,
        evidence=tuple({"kind": line.kind} | line.as_json() for line in lines),
        summary=result.evidence.extended(processes=2),
    ).model_copy(update=changed)


@pytest.fixture
def of_verl(trained, tmp_path):
    """The folder that verl would leave, and a copy of the runs; what is given changes the record."""

    def make(**changed):
        folder = tmp_path / "checkpoints"
        weights = folder / "global_step_2" / "actor" / "huggingface"
        shutil.copytree(trained.path / "final", weights)
        (folder / ENGINE_RUN).write_text(json.dumps(record_of(trained, **changed).as_json()))
        shutil.copy(trained.path / "metrics.jsonl", folder / ENGINE_METRICS)
        shutil.copytree(trained.path.parents[1], tmp_path / "runs")
        return folder, weights, tmp_path / "runs"

    return make


def taken(folder, runs, *options):
    return fp4rl(["runs", "import", str(folder), "--runs", str(runs), *options])


def of_arm(runs, arm):
    (found,) = (read_run(run) for run in finished_runs(runs) if run.result().arm == arm)
    return found


def test_it_is_a_run_of_its_suite_without_gaps_and_its_weights_measure_what_they_measured(of_verl, capsys):
    folder, _, runs = of_verl()
    assert taken(folder, runs) == 0
    own, verl = of_arm(runs, "own"), of_arm(runs, "verl")
    assert verl.key in {f"two/{run.run_id}" for run in planned(Suite.model_validate(SUITE))}
    assert (verl.gaps, own.gaps) == ((), ())
    assert verl.spec["engine"] == "verl"
    assert verl.described | {"engine": None} == own.described | {"engine": None}
    assert [e.as_json() for e in verl.result.evaluations] == [e.as_json() for e in own.result.evaluations]
    assert verl.curves == own.curves
    assert verl.of(LiveCheck) == [LiveCheck(max_difference=0.0, compared="weights")]
    for kind in (MasterCheck, Injected, Evaluation, WeightsMoved):  # those of the start come later than in a run of TRL
        assert {*map(repr, verl.of(kind))} == {*map(repr, own.of(kind))}
    assert taken(folder, runs) == 0
    assert "is here already as two/verl-s0-" in " ".join(capsys.readouterr().out.split())


def test_every_verb_takes_it_as_any_other_run(of_verl, capsys):
    folder, _, runs = of_verl()
    assert taken(folder, runs, "--json") == 0
    key = json.loads(capsys.readouterr().out)["run"]
    shutil.rmtree(folder)  # a run has its own copy of the weights
    packed = ["export", key, str(folder), "--to", "compressed_tensors", "--anyway"]
    for verb in (["runs"], ["show", key], ["health", str(runs / key)], ["report", str(runs / "two")], packed):
        ending = [] if verb[0] in ("health", "report") else ["--runs", str(runs)]
        assert fp4rl([*verb, *ending]) == 0, verb
    assert "verl" in capsys.readouterr().out


def test_the_difference_of_engines_is_said_unless_it_is_declared(of_verl, capsys):
    folder, _, runs = of_verl()
    taken(folder, runs)
    where = ["--runs", str(runs)]
    assert fp4rl(["compare", "verl@full", "own@full", *where]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "the specs differ in engine: verl against none" in out
    fp4rl(["compare", "two", "--json", *where])
    (answer,) = json.loads(capsys.readouterr().out)
    assert [objection["kind"] for objection in answer["objections"]] == ["identical"]  # it is the same run here


def test_weights_that_were_not_trained_last_are_refused_and_nothing_is_written(of_verl, capsys):
    folder, weights, runs = of_verl()
    file = weights / "model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    tensors[first].view(-1)[0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert taken(folder, runs) == 1
    assert "does not hold the weights that verl trained last" in " ".join(capsys.readouterr().err.split())
    assert [run.result().arm for run in finished_runs(runs)] == ["own"]


def without_training(line):
    return (line["kind"], line.get("phase")) != ("injection", "training")


def test_evidence_that_is_missing_makes_it_incomparable(trained, of_verl, capsys):
    evidence = tuple(filter(without_training, record_of(trained).evidence))
    folder, _, runs = of_verl(evidence=evidence)
    assert taken(folder, runs) == 0
    assert "no quantized call was counted during training" in " ".join(capsys.readouterr().out.split())
    assert of_arm(runs, "verl").gaps == ("no quantized call was counted during training",)


def test_without_a_digest_of_what_was_trained_nothing_ties_the_weights_to_the_run(trained, of_verl):
    summary = trained.result().evidence.model_copy(update={"final_weights": None})
    folder, _, runs = of_verl(summary=summary)
    taken(folder, runs)
    assert of_arm(runs, "verl").gaps == ("no check of its live policy against the saved one is recorded",)


def test_the_same_experiment_with_other_weights_is_no_second_copy(trained, of_verl, capsys):
    folder, _, runs = of_verl()
    taken(folder, runs)
    other = trained.result().evidence.model_copy(update={"final_weights": "0123456789ab"})
    (folder / ENGINE_RUN).write_text(json.dumps(record_of(trained, summary=other).as_json()))
    assert taken(folder, runs) == 2
    assert "is here already with other weights" in " ".join(capsys.readouterr().err.split())


def test_an_import_that_broke_off_is_done_again(of_verl):
    folder, _, runs = of_verl()
    left = runs / "two" / next(r.run_id for r in planned(Suite.model_validate(SUITE)) if r.arm == "verl")
    (left / "items").mkdir(parents=True)
    (left / "evidence.jsonl").write_text('{"kind": "failed", "why": "killed"}\n')
    assert taken(folder, runs) == 0
    assert of_arm(runs, "verl").gaps == ()


def test_a_run_that_is_not_finished_is_no_run_yet_and_its_metrics_are_a_log(of_verl, capsys):
    folder, _, runs = of_verl()
    (folder / ENGINE_RUN).unlink()
    assert taken(folder, runs) == 2
    assert f"no {ENGINE_RUN}" in capsys.readouterr().err
    assert taken(folder / ENGINE_METRICS, runs) == 0
    assert any(run.suite == "imported" for run in finished_runs(runs))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: (folder / ENGINE_RUN).write_text("{"), "damaged"),
        (lambda folder: (folder / ENGINE_RUN).write_text('{"engine": "verl"}'), "damaged"),
        (lambda folder: (folder / ENGINE_METRICS).write_text('{"loss": 1}\n'), "line 1 has no step"),
    ],
)
def test_a_damaged_record_is_named(of_verl, damage, why):
    folder, *_ = of_verl()
    damage(folder)
    with pytest.raises(InvalidValueError, match=why):
        read_verl_run(folder)


def test_missing_weights_are_told_with_the_way_to_make_them(of_verl):
    folder, weights, _ = of_verl()
    shutil.rmtree(weights)
    run = read_verl_run(folder)
    with pytest.raises(NotFoundError, match=r"save_contents=\[model,hf_model\]"):
        saved_weights(run)
    (weights.parent / "model_world_size_2_rank_0.pt").touch()
    with pytest.raises(NotFoundError, match=r"verl\.model_merger merge --backend fsdp --local_dir"):
        saved_weights(run)


@pytest.mark.parametrize("options", [["--seed", "1"], ["--note", "x"]])
def test_options_of_logs_are_refused_for_a_run_that_records_its_own(of_verl, options, capsys):
    folder, _, runs = of_verl()
    assert taken(folder, runs, *options) == 2
    assert f"{options[0]}: {folder}" in " ".join(capsys.readouterr().err.split()).replace("- ", "-")


@pytest.fixture
def real(tmp_path):
    """What two ranks of verl 0.9.1 left of two steps under w4a16 and noise, with the weights that its merger joined."""
    folder = shutil.copytree(Path(__file__).parents[2] / "data" / "verl_run", tmp_path / "verl_run")
    return folder, folder / "merged", tmp_path / "runs"


def test_what_verl_itself_left_is_taken_in_without_gaps(real, capsys):
    folder, merged, runs = real
    assert taken(folder, runs, "--suite", "real", "--arm", "w4a16", "--model", str(merged)) == 0
    run = of_arm(runs, "w4a16")
    assert run.gaps == ()
    assert (run.seed, run.result.steps_done, run.result.versions["verl"]) == (7, 2, "0.9.1")
    assert run.result.evaluated_with["transformers"] == transformers.__version__
    noise = [(line.step, line.sigma) for line in run.of(RolloutNoise)]
    assert noise == [(0, 0.05), (1, 0.02), (2, 0.02)]  # from the first rollout to the last
    layers = [line for rollout in run.of(RolloutNoise) for line in rollout.layers]
    assert all(line.drawn == pytest.approx(line.sigma, rel=0.27) for line in layers)  # 3 sd of 64 values
    rows = [row for row in run.of(Injected) if row.profile is None]
    assert Counter(row.phase for row in rows) == {"rollout": 14, "training": 14}
    assert {(row.site, row.elements) for row in rows if row.phase == "rollout"} == {
        (plan.site, 2 * 3 * math.prod(plan.shape))  # two ranks, three streams
        for plan in run.sites.plans
    }
    assert {e.profile.name for e in run.result.evaluations if e.last} == {"full", "deployment"}
    assert "step 0 is not evaluated: model is not here" in run.warnings[0]
    assert fp4rl(["show", run.key, "--runs", str(runs)]) == 0


def test_one_bit_of_what_verl_left_is_another_model(real, capsys):
    folder, merged, runs = real
    file = merged / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"].view(torch.int16)[0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert taken(folder, runs, "--model", str(merged)) == 1
    assert "digest" in capsys.readouterr().err


def test_verls_own_shards_are_not_joined_in_silence(real, capsys):
    folder, _, runs = real
    assert taken(folder, runs) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "global_step_2/actor: the weights after the last step are not here in Hugging Face's form" in said
