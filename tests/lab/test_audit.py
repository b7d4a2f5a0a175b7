"""The audit: published comparisons with their intervals, and treatments that never happened."""

import json
from pathlib import Path

import pytest

from fp4rl.cli.main import main
from fp4rl.lab.audit.audit import Audit, audit
from fp4rl.lab.audit.confounds import confounds, noise_finding
from fp4rl.lab.audit.records import Record, ReportedNoise, Reports, read_reports
from fp4rl.spec.errors import InvalidValueError, NotFoundError


@pytest.fixture(scope="module")
def published(shared_data: Path) -> Audit:
    return audit(read_reports(shared_data / "reported_experiments.json"))


def test_the_published_lora_comparison_comes_out_as_it_should(published: Audit):
    (one,) = [p for p in published.pairs if (p.pair.treatment.id, p.pair.control.id) == ("E6b", "E6a")]
    assert (one.pair.treatment.final_accuracy, one.pair.control.final_accuracy) == (67.48, 65.88)
    assert (one.solved, published.problems) == ((890, 869), 1319)
    assert round(one.difference.p, 2) == 0.39
    assert (round(100 * one.difference.low, 1), round(100 * one.difference.high, 1)) == (-2.0, 5.2)
    assert one.replicates
    assert one.inside_band


def test_every_record_is_there_with_its_noise(published: Audit):
    assert len(published.records) == 97
    silent = {one.record.id for one in published.records if one.noise.state == "never effective"}
    stated = {one.record.id for one in published.records if one.record.aqn.effective_noise is False}
    assert silent == stated
    assert len(silent) == 16
    assert all(one.noise.reasons for one in published.records if one.noise.state == "never effective")


def test_stated_confounds_are_kept_and_found_ones_added(published: Audit):
    found = {one.record.id: one.confounds for one in published.records}
    assert all(set(one.record.confounds) <= set(found[one.record.id]) for one in published.records)
    assert "final is step 20 of 29" in found["E6b"]
    assert "70.27 % is no whole number of 1319 problems" in found["E5c"]
    assert any(text.startswith("step 0 is 75.97") for text in found["exp1d"])
    assert "final 68.92 is not the curve's 68.16 at step 116" in found["E5"]


def test_records_without_a_result_are_not_compared(published: Audit):
    compared = {one.pair.treatment.id for one in published.pairs} | {one.pair.control.id for one in published.pairs}
    stands = {one.record.id for one in published.records if one.record.counts_as_result}
    assert compared <= stands
    assert "E13j" not in compared, "its own report calls it invalid"


def test_the_run_to_run_spread_comes_from_accidental_repeats(published: Audit):
    assert published.spread is not None
    assert 0.8 < published.spread.sd < 1.8
    assert ("E6a", "E6b") in published.repeats


def test_the_audit_on_the_command_line_lists_all(shared_data: Path, capsys: pytest.CaptureFixture[str]):
    file = str(shared_data / "reported_experiments.json")
    assert main(["audit", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["records"]) == 97
    assert main(["audit", file]) == 0
    text = capsys.readouterr().out
    assert "16 arms whose noise was never effective" in text
    assert "+1.6 [-2.0, +5.2]" in text
    assert all(record["id"][:8] in text for record in found["records"])


def _with(noise: dict) -> Record:
    return Record(id="x", final_accuracy=50.0, aqn=ReportedNoise(enabled=True, sigma_start=0.05, **noise))


@pytest.mark.parametrize(
    "noise, state, reason",
    [
        ({"epoch_aware": True}, "never effective", "step 0 of 1"),
        ({"num_stages": 1}, "never effective", "the only interval is the silent one"),
        ({"layer_multipliers": {"default": 0.0}}, "never effective", "every layer multiplier is 0"),
        ({"effective_noise": True, "sigma_end": 0.0}, "not as named", "sigma_end is 0"),
        ({"effective_noise": False}, "never effective", "stated without a reason"),
        ({"effective_noise": True}, "effective", ""),
        ({}, "not known", ""),
    ],
)
def test_noise_is_reasoned_from_the_fields(noise: dict, state: str, reason: str):
    finding = noise_finding(_with(noise))
    assert finding.state == state
    assert reason in " ".join(finding.reasons)


def test_noise_that_was_never_run_is_not_called_effective():
    planned = Record(id="x", status="planned", aqn=ReportedNoise(enabled=True, effective_noise=True))
    assert noise_finding(planned).state == "never run"


def test_a_percentage_printed_with_one_decimal_is_held_to_one_decimal():
    one = Record(id="x", final_accuracy=89.5, status="completed")
    assert not any("whole number" in text for text in confounds(one, Reports(gsm8k_test_n=1319, records=(one,))))


def test_ids_that_stand_twice_are_refused(tmp_path: Path):
    file = tmp_path / "reports.json"
    file.write_text(json.dumps({"gsm8k_test_n": 10, "records": [{"id": "a"}, {"id": "a"}]}))
    with pytest.raises(InvalidValueError, match="stand twice: a"):
        read_reports(file)


def test_another_layout_is_refused_by_its_key(tmp_path: Path):
    file = tmp_path / "reports.json"
    file.write_text(json.dumps({"records": [{"id": "a"}]}))
    with pytest.raises(InvalidValueError, match="gsm8k_test_n: Field required"):
        read_reports(file)
    file.write_text("[")
    with pytest.raises(InvalidValueError, match="not JSON"):
        read_reports(file)
    with pytest.raises(NotFoundError, match="no such file"):
        read_reports(tmp_path / "no.json")
