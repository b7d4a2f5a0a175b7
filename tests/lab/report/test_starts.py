"""Step 0, by value: a number of another run is named, and a low start is told apart from damage by rounding."""

import json
import math

import pytest

from fp4rl.cli.main import main
from fp4rl.lab.report.collect import collect
from fp4rl.spec.records import read_evidence

ARMS = {
    "arms": {
        "bf16": {"evaluation": {"profiles": ["full", "w4a4"]}},
        "w4a4": {"injection": {"mode": "w4a4", "deployment": "compressed_tensors"}},
    },
    "seeds": [0, 1],
    "comparisons": [{"question": "q?", "treatment": "w4a4@full", "control": "bf16@full", "factors": ["injection"]}],
}
FULL = 46.0  # points of a planted suite at step 0, where 9.8 are scored as w4a4, of 500 problems


@pytest.fixture
def trial(make_trial):
    """A suite of two arms; each run's evidence holds its evaluations, as that of a real run does."""
    folder = make_trial(**ARMS).write()
    for run in folder.glob("*-s*"):
        logged(run, json.loads((run / "result.json").read_text())["evaluations"])
    return folder


def logged(run, evaluations):
    """Log numbers without the table of sites, since nothing was rounded for these."""
    with (run / "evidence.jsonl").open("a") as file:
        for told in evaluations:
            line = told | {"kind": "evaluation", "profile": told["profile"] | {"sites_digest": None}}
            assert read_evidence(line) is not None
            file.write(json.dumps(line) + "\n")


def at_start(folder, runs, precision, *, evidence=True, **values):
    """Give the step 0 of these runs other values under a precision, in the result and, but for `evidence`, its log."""
    for run in folder.glob(f"{runs}-*"):
        result = json.loads((run / "result.json").read_text())
        changed = [e for e in result["evaluations"] if e["step"] == 0 and e["profile"]["precision"] == precision]
        for own in changed:
            own |= values
        (run / "result.json").write_text(json.dumps(result))
        if evidence:
            logged(run, changed)


def noted(folder, beginning):
    return [note for note in collect(folder).notes if note.startswith(beginning)]


def test_a_suite_whose_numbers_are_its_own_has_no_such_note(trial):
    report = collect(trial)
    assert not any(run.gaps for run in report.runs)
    assert not noted(trial, "Step 0")


def test_a_number_copied_from_another_run_is_named_by_report_and_compare(trial, capsys):
    """The fault that was made: the start of one run was typed into the table of another."""
    at_start(trial, "w4a4-s0", "w4a4", evidence=False, strict=FULL / 100)
    said = "its result says that deployment scored 46.00% at step 0, and its evidence has 9.80%"
    (found,) = (run for run in collect(trial).runs if run.gaps)
    assert (found.planned.arm, found.planned.seed, found.gaps) == ("w4a4", 0, (said,))
    assert main(["compare", "trial", "--runs", str(trial.parent), "--json"]) == 1
    (answer,) = json.loads(capsys.readouterr().out)
    assert [(each["kind"], each["treatment"]) for each in answer["objections"]] == [("evidence", said)]


def test_a_number_that_was_copied_into_the_log_too_is_not_that_of_its_twins(trial):
    """One start under one condition, greedily: what the other seed scored is what this one must have scored."""
    at_start(trial, "w4a4-s0", "w4a4", strict=FULL / 100)
    (note,) = noted(trial, "Step 0 of one start, judged as w4a4")
    assert "46.0 % in w4a4 seed 0" in note
    assert "9.8 % in bf16 seed 0, bf16 seed 1, w4a4 seed 1" in note


def test_another_machine_may_score_otherwise(trial):
    at_start(trial, "w4a4-s0", "w4a4", strict=FULL / 100)
    (run,) = trial.glob("w4a4-s0-*")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"device": "another"}))
    assert not noted(trial, "Step 0 of one start")


def test_a_start_that_is_as_low_unrounded_is_the_format_of_answers(trial):
    """8 % at step 0 was taken for damage by rounding; the unrounded model scored the same (41 and 40 of 500)."""
    at_start(trial, "*", "full", strict=41 / 500, formatted=0.12, flexible=0.61)
    at_start(trial, "*", "w4a4", strict=40 / 500, formatted=0.11, flexible=0.60)
    assert noted(trial, "Step 0") == [
        "Step 0 as w4a4 is 8.0 %, unrounded 8.2 %: no damage by rounding shows; of the asked format are 11% and 12% "
        "of the answers, and 61% unrounded are right in any format."
    ]


def wilson(share):
    """Wilson's interval of a share of 500, written out."""
    z, n = 1.959964, 500
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def test_rounding_that_harms_is_told_with_its_interval(trial):
    """230 and 49 of 500, with the interval of Newcombe (1998), method 10, written out."""
    at_start(trial, "*", "w4a4", formatted=0.30)
    (note,) = noted(trial, "Step 0")
    full, rounded = 0.46, 0.098
    low = full - rounded - math.hypot(full - wilson(full)[0], wilson(rounded)[1] - rounded)
    high = full - rounded + math.hypot(wilson(full)[1] - full, rounded - wilson(rounded)[0])
    assert f"rounding costs 36.2 points (95 %: {100 * low:.1f} to {100 * high:.1f})" in note
    assert "of the asked format are 30% and 97% of the answers" in note
