"""Reading evidence: what is not there is None, never a good result."""

import json

import pytest

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.report.collect import collect
from fp4rl.lab.report.descriptions import arm_differences, measured_under, versions
from fp4rl.lab.report.evidence import (
    evidence_of,
    live_difference,
    masters_unchanged,
    noise_steps,
    roundings,
    sites_quantized,
)
from fp4rl.lab.runs import Run
from fp4rl.spec.records import read_result
from planted.records import line


def run_with(lines) -> Run:
    return Run("s", "r", {}, read_result({"evidence": {}}), [line(**content) for content in lines])


def row(site, phase="rollout", **values):
    return {
        "kind": "injection",
        "phase": phase,
        "site": site,
        "point": "weight",
        "calls": 3,
        "elements": 8,
        "relative_error": None,
    } | values


def test_nothing_recorded_reads_as_none():
    run = run_with([])
    assert (sites_quantized(run), masters_unchanged(run), live_difference(run)) == (None, None, None)
    assert roundings(run) == []


def test_sites_are_pooled_by_phase_and_point_with_medians():
    lines = [row("a", share_changed=0.5), row("b", share_changed=0.9), row("c", share_changed=None)]
    (pooled,) = roundings(run_with(lines))
    assert (pooled.sites, pooled.calls, pooled.elements) == (3, 9, 24)
    assert pooled.share_changed == pytest.approx(0.7)
    assert pooled.relative_error is None


def test_evaluations_under_several_profiles_stay_apart():
    lines = [row("a", "evaluation", profile="w4a16"), row("a", "evaluation", profile="w4a4")]
    phases = [rounding.phase for rounding in roundings(run_with(lines))]
    assert phases == ["evaluation as w4a16", "evaluation as w4a4"]


def test_noise_is_pooled_over_layers_as_a_root_mean_square():
    rest = {"drawn": 0.0, "share_changed": 1.0, "swallowed": 0}
    sizes = ((0, 0.03, 0.04, 100), (1, 0.01, 0.0, 300))
    layers = [{"layer": n, "sigma": s, "realised": r, "elements": e} | rest for n, s, r, e in sizes]
    written = {"kind": "noise", "step": 2, "sigma": 0.02, "share_changed": 0.5, "layers": layers}
    (step,) = noise_steps(run_with([written]))
    assert (step.scheduled, step.realised) == (pytest.approx((0.0003) ** 0.5), pytest.approx(0.02))


def test_one_harmed_master_is_enough():
    lines = [{"kind": "master", "unharmed": unharmed} for unharmed in (True, False, True)]
    assert masters_unchanged(run_with(lines)) is False


def rows_of(report, arm):
    return dict(evidence_of(report.runs, arm).rows)


def test_what_moved_and_was_held_stands_in_the_arms_rows(make_trial):
    folder = make_trial().write()
    for place in folder.glob("w4a16-s*"):
        own = RunFolder(place)
        for step in (0, 1):
            own.add_evidence(line("rounded", phase="rollout", step=step, sites=14))
        own.add_evidence(line("rounded", phase="evaluation", profile="w4a16", sites=14))
        result = own.result().as_json()
        result["evidence"]["weights_changed"] = 0.25
        (place / "result.json").write_text(json.dumps(result))
    rows = rows_of(collect(folder), "w4a16")
    assert rows["operands equal their masters' rounding"] == ["rollout, evaluation"] * 3
    assert rows["weights changed by training"] == ["25.0 %"] * 3
    assert "weights changed by training" not in rows_of(collect(folder), "w4a4")


def test_a_run_without_evidence_shows_what_is_not_recorded(make_trial):
    report = collect(make_trial().write(without_evidence=[("w4a16", 1)]))
    rows = rows_of(report, "w4a16")
    assert rows["enters the means"] == ["yes", "no: it left no evidence", "yes"]
    assert rows["weights rounded in rollout"] == ["6,860 calls", "not recorded", "6,860 calls"]
    assert rows["live policy"][1] == "not recorded"


def test_a_phase_that_the_spec_asks_for_is_shown_even_if_no_run_recorded_it(complete):
    rows = rows_of(complete, "w4a4")
    assert rows["inputs rounded in evaluation"] == ["not recorded"] * 3


def test_an_evaluation_that_recorded_itself_is_shown_under_its_profile(make_trial):
    folder = make_trial().write()
    for run in folder.glob("w4a16-s*"):
        RunFolder(run).add_evidence(line(**row("a", "evaluation", profile="deployment")))
    rows = rows_of(collect(folder), "w4a16")
    assert rows["weights rounded in evaluation as deployment"] == ["3 calls"] * 3
    assert "weights rounded in evaluation" not in rows


def test_the_site_table_keeps_evaluations_under_several_profiles_apart(make_trial):
    folder = make_trial().write()
    for run in folder.glob("w4a16-s*"):
        site = RunFolder(run).sites().plans[0].site
        for profile, error in (("w4a16", 0.1), ("bf16", 0.002)):
            RunFolder(run).add_evidence(line(**row(site, "evaluation", profile=profile, relative_error=error)))
    shown = evidence_of(collect(folder).runs, "w4a16").sites[0][-1]
    assert "evaluation as w4a16 3 calls, weight 10.0 %; evaluation as bf16 3 calls, weight 0.2 %" in shown


def test_noise_asked_and_realised_stand_side_by_side(complete):
    rows = rows_of(complete, "w4a16+aqn")
    assert rows["noise, largest sigma asked"] == ["0.01"] * 3
    assert float(rows["  realised there"][0]) == pytest.approx(0.01, rel=0.03)
    assert rows["  rollouts with noise"] == ["10 of 12"] * 3


def test_every_site_says_its_formats_its_calls_and_its_error_by_phase(complete):
    arm = evidence_of(complete.runs, "w4a4")
    assert arm.sites[0] == [
        "model.layers.0.q_proj",
        "64 x 64",
        "weight mxfp4; input mxfp4",
        "rollout 490 calls, weight 11.0 %, input 11.0 %; training 48 calls, weight 11.0 %, input 11.0 %",
    ]
    assert arm.left_out == [["lm_head", "left by *lm_head*"]]


def test_only_the_keys_in_which_arms_differ_are_listed(complete):
    rows = dict(arm_differences(complete.arms))
    assert rows["injection.weight"] == ["-", *["mxfp4 (scale_rule even)"] * 3]
    assert rows["injection.input"][1:] == ["none", "none", "mxfp4 (scale_rule even)"]
    assert rows["noise.schedule.sigma_start"] == ["-", "-", "0.01", "-"]
    assert "injection.targets.take" not in rows
    assert not any(key.startswith(("training", "task", "model")) for key in rows)


def test_every_number_says_what_it_was_measured_under(make_trial):
    report = collect(make_trial().write(profile={("bf16", "w4a4"): {"scorer": None}}))
    score = next(score for score in report.scores if score.name == "bf16@w4a4")
    facts = dict(measured_under(score.profiles[0], score, report.arms["bf16"]))
    assert facts["precision"] == "w4a4"
    assert facts["formats"] == "weight mxfp4 (scale_rule even); input mxfp4 (scale_rule even)"
    assert facts["deployment"] == "compressed_tensors"
    assert (facts["site table"], facts["problems"], facts["scorer"]) == ("table-w4a4", "500", "not recorded")


def test_formats_of_a_run_of_other_code_are_said_to_be_read_now(make_trial):
    """A mode may have meant others when it ran."""
    report = collect(make_trial().write(stale=[("bf16", seed) for seed in range(3)]))
    found = {
        score.name: dict(measured_under(score.profiles[0], score, report.arms[score.arm])) for score in report.scores
    }
    assert found["bf16@w4a4"]["formats"].endswith("input mxfp4 (scale_rule even), as this code reads it")
    assert "reads it" not in found["w4a4@deployment"]["formats"]


def test_versions_come_from_the_runs(complete):
    assert dict(versions(complete.runs))["torch"] == ["2.13.0"]
