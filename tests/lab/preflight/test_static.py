"""Checks that need no model: each with the very defect planted, and a clean case beside it."""

import pytest

from fp4rl.lab.catalogue import described, names
from fp4rl.lab.catalogue.rows import table
from fp4rl.lab.estimates import Memory
from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import planned
from fp4rl.lab.preflight import deployment, questions, settings, surroundings
from fp4rl.lab.preflight.preflight import preflight
from fp4rl.lab.preflight.rows import Subject
from fp4rl.spec.experiment import Experiment

W4A8 = {"mode": "w4a8", "deployment": "compressed_tensors"}
NOISE = {"schedule": {"kind": "geometric", "sigma_start": 1e-2, "sigma_end": 1e-4, "num_stages": 3}}
SEEDS = {"seeds": [0, 1, 2]}


def asking(**changes):
    question = {"question": "q?", "treatment": "b@full", "control": "a@full", "factors": ["injection"]}
    return {"comparisons": [question], **changes}


def verdicts(rows):
    return [row.verdict for row in rows]


def test_a_schedule_that_is_silent_throughout_fails(subject, rows):
    """One step of three stages: the first one is silent, and there is no other. Three steps reach every value."""
    noisy = {"noise": NOISE}
    (row,) = rows(settings, "schedule", subject(a=noisy | {"training": {"steps": 1}}))
    assert (row.verdict, row.measured) == ("fail", "sigma is 0 in all 1 step")
    (row,) = rows(settings, "schedule", subject(a=noisy | {"training": {"steps": 3}}))
    assert (row.verdict, row.measured) == ("pass", "sigma 0.01 to 0.0001 in 3 steps, 1 of them 0")
    assert rows(settings, "schedule", subject()) == ()


def test_a_schedule_longer_than_its_run_is_warned_of(subject, rows):
    """Of ten stages, two steps meet the first and the sixth."""
    (row,) = rows(
        settings, "schedule", subject(a={"noise": {"schedule": {"num_stages": 10}}, "training": {"steps": 2}})
    )
    assert row.verdict == "warn"
    assert "sigma never reaches" in row.measured


def test_a_key_that_cannot_act_is_warned_of(subject, rows):
    idle = {"training": {"kl_loss_type": "k2"}}
    (row,) = rows(settings, "keys", subject(a={}, b=idle))
    assert (row.verdict, row.arms) == ("warn", ("b",))
    assert "training.kl_loss_type k2 cannot act" in row.measured
    acts = {"training": {"kl_loss_type": "k2", "kl_loss_coef": 0.1}}
    assert verdicts(rows(settings, "keys", subject(a={}, b=acts))) == ["pass"]


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("recipe", {"training": {"lr_warmup_steps": 2}}),
        ("evaluations", {"evaluation": {"test_freq": 7}}),
        (
            "batch",
            {"evaluation": {"profiles": ["nvfp4"]}, "injection": {"input": "nvfp4", "apply_during": ["evaluation"]}},
        ),
        ("loss", {"training": {"mini_batch_size": 4}}),
        (
            "updates",
            {"model": {"embedded": {}, "dtype": "bfloat16", "master_dtype": "bfloat16"}, "training": {"lr": 1e-6}},
        ),
    ],
)
def test_what_a_description_warns_of_is_a_row_of_its_check(check, change, subject, rows):
    if check == "batch":
        change = {"evaluation": {"profiles": ["deployment"]}, "injection": change["injection"]}
    assert verdicts(rows(settings, check, subject(a=change))) == ["warn"]
    assert verdicts(rows(settings, check, subject())) == ["pass"]


def test_arms_that_differ_in_more_than_their_factor_are_warned_of(subject, rows):
    more = {"injection": W4A8, "training": {"steps": 3}}
    (row,) = rows(questions, "questions", subject(suite=asking(), a={}, b=more))
    assert row.verdict == "warn"
    assert "its arms also differ in training.steps" in row.measured
    assert verdicts(rows(questions, "questions", subject(suite=asking(), a={}, b={"injection": W4A8}))) == ["pass"]


def test_a_decay_in_one_arm_alone_is_warned_of(subject, rows):
    decays = {"injection": W4A8, "training": {"lr_scheduler": "cosine"}}
    (row,) = rows(questions, "questions", subject(suite=asking(), a={}, b=decays))
    assert row.verdict == "warn"
    assert "training.lr_scheduler" in row.measured


def test_a_treatment_that_trains_longer_than_its_control_is_warned_of(subject, rows):
    longer = {"injection": W4A8, "training": {"steps": 4}}
    (row,) = rows(questions, "budgets", subject(suite=asking(), a={}, b=longer))
    assert (row.verdict, "2 steps" in row.measured, "4 steps" in row.measured) == ("warn", True, True)
    assert verdicts(rows(questions, "budgets", subject(suite=asking(), a={}, b={"injection": W4A8}))) == ["pass"]


def test_one_seed_is_warned_of(subject, rows):
    arms = {"a": {}, "b": {"injection": W4A8}}
    assert verdicts(rows(questions, "seeds", subject(suite=asking(seeds=[0]), **arms))) == ["warn"]
    assert verdicts(rows(questions, "seeds", subject(suite=asking(), **arms))) == ["pass"]
    assert rows(questions, "seeds", subject(**arms)) == ()  # nothing is asked


def test_a_handful_of_problems_is_warned_of_with_its_interval(subject, rows):
    """Half of the widest 95 % interval of a binomial share: 1.96 sqrt(.25 / n)."""
    for problems, verdict, half in (
        (24, "warn", "20.0"),
        (199, "warn", "6.9"),
        (200, "pass", "6.9"),
        (500, "pass", "4.4"),
    ):
        (row,) = rows(questions, "sample", subject(a={"evaluation": {"count": problems}}))
        assert row.verdict == verdict
        assert f"+-{half} points" in row.measured


def test_a_suite_without_an_unrounded_accuracy_is_warned_of(subject, rows):
    blind = {"injection": W4A8, "evaluation": {"profiles": ["deployment"]}}
    assert verdicts(rows(questions, "reference", subject(a=blind))) == ["warn"]
    assert verdicts(rows(questions, "reference", subject(a=blind, b={}))) == ["pass"]


def test_errors_that_act_while_judging_are_warned_of(subject, rows):
    errors = {"injection": {"errors": [{"scale": 0.05}], "apply_during": {"errors": ["training", "evaluation"]}}}
    judged = {"evaluation": {"profiles": ["full", "deployment"]}}
    (row,) = rows(questions, "noise judged", subject(judged, a=errors))
    assert row.verdict == "warn"
    assert "while judging as deployment" in row.measured
    apart = {"injection": {"errors": [{"scale": 0.05}]}}
    assert verdicts(rows(questions, "noise judged", subject(judged, a=apart))) == ["pass"]


def test_a_mode_that_is_served_as_another_is_warned_of(subject, rows):
    """vLLM on Blackwell takes an MXFP4 checkpoint without FP8 inputs for W4A4."""
    served = {"injection": {"mode": "w4a16", "deployment": "vllm_blackwell"}}
    (row,) = rows(deployment, "served", subject(a=served))
    assert row.verdict == "warn"
    assert "w4a16 is computed here, but vllm_blackwell serves w4a4" in row.measured
    assert verdicts(rows(deployment, "served", subject(a={"injection": W4A8}))) == ["pass"]


def test_inputs_that_nothing_serves_are_warned_of(subject, rows):
    own = subject(a={"injection": {"mode": "w4a4", "input": {"name": "mxfp4", "fallback": 0.25}}})
    for kind, words in (("served", "nothing serves it"), ("rule", "no deployment can be named")):
        (row,) = rows(deployment, kind, own)
        assert row.verdict == "warn"
        assert f"{words}: inputs with a fallback are rounded twice" in row.measured


def test_a_rule_of_inputs_that_the_kernel_does_not_have_fails(subject, rows):
    """A rule that the description sets beside a deployment is refused when it is read, so it is planted behind that."""
    own = subject(a={"injection": W4A8})
    assert verdicts(rows(deployment, "rule", own)) == ["pass"]
    experiment = own.arms["a"]
    other = Experiment.model_validate({"injection": {"mode": "w4a8", "deployment": "vllm_ascend"}}).injection.input
    injection = experiment.injection.model_copy(update={"input": other})
    own.arms["a"] = experiment.model_copy(update={"injection": injection})
    assert verdicts(rows(deployment, "rule", own)) == ["fail"]
    assert verdicts(rows(deployment, "rule", subject(a={"injection": "w4a4"}))) == ["warn"]  # no deployment is named


def test_what_the_machine_lacks_fails_with_its_remedy(subject, rows, tmp_path, monkeypatch):
    gone = subject(a={"model": {"path": str(tmp_path / "gone"), "embedded": None}})
    (row,) = rows(surroundings, "files", gone)
    assert row.verdict == "fail"
    assert "model.path" in row.measured
    assert row.cure
    assert verdicts(rows(surroundings, "files", subject())) == ["pass"]

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    logged = subject(report_to=("wandb", "no_such_logger"))
    assert [(row.verdict, row.cure.partition(",")[0]) for row in rows(surroundings, "loggers", logged)] == [
        ("fail", "`wandb login`"),
        ("fail", "pip install 'fp4rl[no_such_logger]'"),
    ]
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0000\n")
    assert rows(surroundings, "loggers", logged)[0].verdict == "pass"

    monkeypatch.setattr(surroundings, "find_spec", lambda name: None)
    assert verdicts(rows(surroundings, "packages", subject())) == ["fail"]


def test_a_place_that_cannot_be_written_and_a_full_disk_fail(subject, rows, monkeypatch):
    """The size of the embedded model's run is a guess, for which nobody is stopped; that of a folder is known."""
    own = subject()
    assert verdicts(rows(surroundings, "room", own)) == ["pass"]
    usage = surroundings.shutil.disk_usage(own.root.parent)
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert verdicts(rows(surroundings, "room", own)) == ["warn"]
    weights = Memory({"weights": 600.0, "optimizer": 900.0})  # twice the weights, with one checkpoint, and its states
    monkeypatch.setattr(surroundings, "memory_of", lambda _: weights)
    (row,) = rows(surroundings, "room", own)
    assert row.verdict == "fail"
    assert surroundings._size(own.arms["a"]) == 600 + 600 + 900

    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(surroundings.tempfile, "TemporaryFile", denied)
    (row,) = rows(surroundings, "room", own)
    assert (row.verdict, row.cure) == ("fail", "name another place with --runs")


def test_a_damaged_result_is_warned_of(subject, rows):
    own = subject()
    assert verdicts(rows(surroundings, "folders", own)) == ["pass"]
    folder = run_folder(own.root, own.runs[0].suite, own.runs[0].run_id).path
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{")
    (row,) = rows(surroundings, "folders", own)
    assert (row.verdict, row.measured) == ("warn", "3 runs, 1 finished, 1 damaged")


PLANNED = [name for name in names() if name not in table().rows or table().rows[name].refused is None]


@pytest.mark.parametrize("name", PLANNED)
def test_no_suite_of_the_catalogue_fails(name, tmp_path):
    suite = described(name)
    own = Subject(suite, planned(suite), tmp_path)
    failed = [row for row in preflight(own, ["nothing"]) if row.verdict == "fail" and row.check != "files"]
    assert not failed
