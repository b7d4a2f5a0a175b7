"""Records are typed: a writer's mistake is an error there, and what older versions wrote reads on.

`tests/data/format0` was written before records had types: three runs, with every kind of line among them.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from fp4rl.cli.main import main
from fp4rl.lab.compare.differing import differences
from fp4rl.lab.files import json_ready
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.ledger.tables import record_of, run_of
from fp4rl.lab.matrix import PlannedRun, planned
from fp4rl.lab.runs import read_run
from fp4rl.lab.suites import read_suite
from fp4rl.spec.digest import NO_SEED, digest, digest_by_seed
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.evidence import KINDS, Evaluation, LiveCheck, MasterCheck, Profile
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.load import parse
from fp4rl.spec.records import VERSION, RunResult, read_all_evidence, read_evidence, read_result, read_sites

OLD = Path(__file__).parents[1] / "data" / "format0"


def lines():
    for file in OLD.glob("old/*/evidence.jsonl"):
        yield from map(json.loads, file.read_text().splitlines())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LiveCheck(max_diference=0.0),
        lambda: LiveCheck(max_difference="0.0"),
        lambda: MasterCheck(phase="rollot", step=1, unchanged=True, digest="ab"),
        lambda: MasterCheck(phase="rollout", step=True, unchanged=True, digest="ab"),
        lambda: Evaluation(step=1, profile=Profile(name="full"), strict=67.5),
        lambda: Evaluation(step=1, profile={"name": "full", "scoerr": "x"}, strict=0.5),
        lambda: RunResult(versions={"torch": 2.1}),
    ],
)
def test_a_wrong_key_or_type_is_an_error_at_the_writer(wrong):
    with pytest.raises(ValidationError):
        wrong()


def test_every_kind_of_the_old_folder_comes_back_as_it_was_written():
    seen = set()
    for written in lines():
        record = read_evidence(written)
        seen.add(record.kind)
        assert json_ready({"kind": record.kind} | record.as_json()) == written
    # Of a run without a result, of one that a server sampled for, of a transformed start, of codes that were
    # followed, of weights that were clamped, of answers that an earlier run had given.
    never = {"failed", "weights_served", "transformed", "oscillation", "clipping", "reused"}
    assert seen | never == set(KINDS)
    for name, read in (("result.json", read_result), ("sites.json", read_sites)):
        for file in OLD.glob(f"old/*/{name}"):
            written = json.loads(file.read_text())
            assert json_ready(read(written).as_json()) == written


def test_a_reader_takes_what_is_missing_and_what_is_new_and_numbers_written_as_words():
    assert read_evidence({"kind": "live_equals_fresh", "max_difference": "inf"}).max_difference == float("inf")
    assert read_evidence({"kind": "warning", "line": "x", "colour": "red"}).as_json() == {"line": "x"}
    assert read_evidence({"kind": "of another version"}) is None
    assert read_result({}) == RunResult()


@pytest.mark.parametrize(
    ("read", "content", "said"),
    [
        (read_evidence, {"phase": "rollout"}, "needs a 'kind'"),
        (read_evidence, {"kind": "checkpoint"}, "step"),
        (read_result, {"evaluations": [{"step": 1}]}, "evaluations.0.strict"),
        (read_result, {"evaluations": [{"step": 1, "strict": 67.5}]}, "evaluations.0.strict"),
        (read_result, {"version": VERSION + 1}, "newer fp4rl"),
        (read_sites, {"digest": ["a"]}, "digest"),
    ],
)
def test_what_is_no_record_is_one_line_that_names_the_key(read, content, said):
    with pytest.raises(InvalidValueError, match=said) as error:
        read(content)
    assert "\n" not in str(error.value)


def test_a_renamed_key_is_read_by_its_old_name_and_changes_no_id_and_no_comparison(tmp_path):
    old = next(OLD.glob("old/bf16-s0-*"))
    content = yaml.safe_load((old / "spec.yaml").read_text())
    assert "harm" in content["health"]["thresholds"]
    experiment = parse(Experiment, content, "spec.yaml")
    present = experiment.model_dump(mode="json")
    assert present["health"]["thresholds"]["accuracy_drop_watch"] == 0.3
    assert digest(experiment) == digest(present) == digest(content) == old.name.rpartition("-")[2]
    run = read_run(RunFolder(old))
    assert not differences(run.spec, present)
    assert not differences(
        run_of(json.loads(json.dumps(record_of(run, "", [], []) | {"spec": content})), {}).spec, present
    )

    content["health"]["thresholds"]["harm"] = 0.2
    assert parse(Experiment, content, "spec.yaml").health.thresholds.accuracy_drop_watch == 0.2
    content["health"]["thresholds"]["accuracy_drop_watch"] = 0.2
    with pytest.raises(InvalidValueError, match="unknown key"):
        parse(Experiment, content, "spec.yaml")


@pytest.mark.parametrize("wrong", ['"other"', "null", "1", "1.5", "true", '"nan"', "NaN", "[]", "{}", "[1", "\\"])
def test_a_line_of_bytes_says_what_its_json_says_and_is_refused_alike(wrong):
    for written in lines():
        for key in written:
            text = ", ".join(f'"{k}": {wrong if k == key else json.dumps(v)}' for k, v in written.items())
            for line in (f"{{{text}}}", f'{{{text}, "new": {wrong}}}', f"{{{text}, {text}}}"):
                assert said(line, str.encode) == said(line, json.loads), line


def test_lines_read_together_are_the_lines_read_alone():
    written = [json.dumps(line).encode() for line in lines()]
    alone = tuple(map(read_evidence, written))
    assert read_all_evidence(written) == alone
    assert read_all_evidence([b'{"kind": "of a newer version"}', *written]) == alone
    assert read_all_evidence([]) == ()
    first, second = (b'{"kind": "noise_stages", "ran": [[0, 1]', b'[1, 2]], "missed": []}')
    for torn in ([first, second], [written[0][:-1], *written], [b"%b, %b" % (written[0], written[1])]):
        with pytest.raises(ValueError, match=r"Expecting|Extra data|delimiter"):
            read_all_evidence(torn)


@pytest.mark.parametrize(
    "description",
    [{"a": 1}, {"seed": 3, "z": [1.5, None]}, {"a": {"seed": 7}}, {"a": f'"seed":{NO_SEED}'}, {"a": NO_SEED}],
)
def test_digests_by_seed_are_the_digests_of_the_whole_descriptions(description):
    for seed in (0, 1, 77, -5, 10**17):
        assert digest_by_seed(description)(seed) == digest({**description, "seed": seed})


def test_planned_runs_have_the_digest_of_their_experiment_also_with_another():
    suite = Suite.model_validate({"suite": "s", "seeds": [0, 5], "arms": {"a": {}, "b": {"training": {"lr": 1e-4}}}})
    for run in planned(suite):
        assert run.spec_digest == digest(run.experiment)
        other = replace(run, experiment=run.experiment.model_copy(update={"engine": "verl"}))
        assert other.spec_digest == digest(other.experiment) != run.spec_digest


def said(line, form):
    try:
        return str(read_evidence(form(line)))  # not-a-number does not equal itself
    except ValueError as error:
        return type(error), str(error)


def test_every_verb_reads_the_old_folder(tmp_path, monkeypatch, capsys):
    shutil.copytree(OLD, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    run = next((tmp_path / "runs" / "old").glob("w4a4-s0-*")).name
    verbs = {
        ("runs", "--json"): run,
        ("show", f"old/{run}"): "noise_stages: 1 line",
        ("report", "runs/old"): "3 of 3 runs",
        ("compare", "old/w4a4@deployment", "old/bf16@w4a4"): "Does W4A4 cost accuracy?",
        ("ledger", "rebuild"): "3 runs recorded",
    }
    for verb, said in verbs.items():
        assert main([*verb]) == 0, verb
        assert said in capsys.readouterr().out
    assert main(["compare", "old/w4a4@deployment", "old/bf16@w4a4", "--factor", "injection.preset"]) == 1
    assert "differ" in capsys.readouterr().out  # in more than that key, which is one
    assert main(["health", "old", "--rule", "stop if entropy > 0 at step 2"]) == 1
    assert "3 of 3 runs had an alarm" in capsys.readouterr().err
    assert main(["compare", "old/ill@full", "old/bf16@full"]) == 1
    assert "stopped early" in capsys.readouterr().out


def test_an_old_folder_names_the_deployment_that_its_numbers_were_computed_with(tmp_path):
    shutil.copytree(OLD, tmp_path / "runs")
    suite = read_suite(tmp_path / "runs" / "old")
    assert [run.state for run in suite.runs] == ["finished"] * 3  # planned under the present names, found by their ids
    run = suite.by_arm["w4a4"][0].run
    assert run.spec["injection"]["deployment"] == "compressed_tensors"
    assert run.spec["injection"]["weight"] == {"name": "mxfp4", "scale_rule": "even"}
    assert run.spec["evaluation"]["deployment"] == "compressed_tensors"
    assert not differences(run.spec, suite.by_arm["w4a4"][0].planned.experiment.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("preset", "weight", "entry", "named"),
    [
        ("vllm_ascend", "mxfp4", {"name": "mxfp4", "rounding": "half_away"}, "vllm_ascend_floor"),
        ("modelopt", *[{"name": "mxfp4", "scale_rule": "rceil"}] * 2, "vllm_blackwell_rceil"),
    ],
)
def test_a_result_under_a_preset_shows_the_rule_that_it_was_computed_with(
    tmp_path, capsys, preset, weight, entry, named
):
    """A folder as this version writes it, but for the key that was renamed since."""
    old = next(OLD.glob("old/w4a4-s0-*"))
    content = yaml.safe_load((old / "spec.yaml").read_text())
    content["injection"] |= {"preset": preset, "weight": weight, "input": entry}
    content["evaluation"]["preset"] = preset
    result = read_result(json.loads((old / "result.json").read_text()))
    run_id = f"w4a4-s0-{digest(content)}"
    folder = tmp_path / "runs" / "old" / run_id
    shutil.copytree(old, folder)
    (folder / "spec.yaml").write_text(yaml.safe_dump(content))
    written = result.extended(run_id=run_id, spec_digest=digest(content)).as_json()
    (folder / "result.json").write_text(json.dumps(json_ready(written | {"version": VERSION})))

    spec = read_run(RunFolder(folder)).spec
    assert (spec["injection"]["deployment"], spec["evaluation"]["deployment"]) == (named, named)
    assert (spec["injection"]["weight"], spec["injection"]["input"]) == (weight, entry)
    assert main(["show", f"old/{run_id}", "--runs", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert f"deployment: {named}" in shown
    assert f"deployment: {preset}\n" not in shown

    again = parse(Experiment, content, "spec.yaml")
    assert again.injection.deployment == named
    assert PlannedRun("old", "w4a4", 0, again).run_id == run_id
    present = parse(Experiment, spec | {"injection": {"mode": "w4a4", "deployment": preset}}, "spec.yaml")
    assert PlannedRun("old", "w4a4", 0, present).run_id != run_id
