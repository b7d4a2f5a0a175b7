"""Bands of a suite: stated beforehand, shown with the interval of what was measured, and with what comes next."""

import json

import pytest
import yaml

from fp4rl.cli.main import main
from fp4rl.lab.bands import banded
from fp4rl.lab.suites import read_suite
from fp4rl.spec.criteria import Criterion

BANDS = {"of": "w4a4@deployment", "against": "bf16@full", "bands": {"pass": -1.0, "marginal": -3.0, "fail": None}}
FOUR = {"of": "w4a4@deployment", "bands": {"excellent": 72, "good": 70, "acceptable": 60, "poor": None}}


def test_a_band_is_that_of_the_mean_and_says_what_its_interval_allows(make_trial):
    suite = read_suite(make_trial().write())
    (measured, four) = banded(suite, [Criterion.model_validate(BANDS), Criterion.model_validate(FOUR)])
    own = [100 * run.run.evaluations()["deployment"].strict for run in suite.by_arm["w4a4"]]
    control = [100 * run.run.evaluations()["full"].strict for run in suite.by_arm["bf16"]]
    difference = sum(own) / len(own) - sum(control) / len(control)
    assert measured.value == pytest.approx(difference)
    assert measured.low < difference < measured.high
    assert measured.band == ("pass" if difference >= -1 else "marginal" if difference >= -3 else "fail")
    assert measured.band in measured.possible
    assert four.value == pytest.approx(sum(own) / len(own))
    assert "over 3 seeds" in measured.sentence()


@pytest.mark.parametrize(
    ("value", "band"), [(72.0, "excellent"), (71.99, "good"), (70.0, "good"), (60.0, "acceptable"), (0.0, "poor")]
)
def test_a_number_on_a_limit_belongs_to_the_band_that_begins_there(value, band):
    assert Criterion.model_validate(FOUR).band_of(value) == band


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"bands": {"pass": 1.0}}, "name at least two"),
        ({"bands": {"pass": 1.0, "fail": 0.0}}, "one is null"),
        ({"bands": {"pass": 0.0, "good": 0.0, "fail": None}}, "the same number"),
        ({"next": {"none": {"do": ["e6b"], "why": "x"}}}, "is no band"),
    ],
)
def test_bands_that_cannot_be_meant_are_refused(change, part):
    with pytest.raises(ValueError, match=part):
        Criterion.model_validate(BANDS | change)


def test_what_comes_next_is_shown_with_its_reason(make_trial, capsys, monkeypatch):
    trial = make_trial()
    folder = trial.write()
    content = yaml.safe_load((folder / "suite.yaml").read_text())
    steps = {band: {"do": ["e13h"], "why": f"since it is {band}"} for band in BANDS["bands"]}
    (folder.parent / "mine.yaml").write_text(
        yaml.safe_dump(content | {"criteria": [BANDS | {"next": steps}]}, sort_keys=False)
    )
    assert main(["plan", str(folder.parent / "mine.yaml"), "--next", "--runs", str(folder.parent)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    band = next(band for band in BANDS["bands"] if f"since it is {band}" in said)
    assert f"next e13h: since it is {band}" in said
    assert main(["plan", str(folder.parent / "mine.yaml"), "--next", "--json", "--runs", str(folder.parent)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["band"] == band


def test_no_band_is_given_where_the_comparison_of_its_sides_is_refused(make_trial):
    """A treatment that never acted is no pass: without evidence the pair is refused, and so is its band."""
    whole = read_suite(make_trial().write())
    declared = whole.comparisons[0]
    criterion = Criterion.model_validate(
        {"of": declared.treatment, "against": declared.control, "bands": BANDS["bands"]}
    )
    (fair,) = banded(whole, [criterion])
    assert fair.refused is None
    assert fair.band is not None
    bare = make_trial(suite="bare").write(without_evidence=[(declared.treatment.partition("@")[0], 1)])
    (measured,) = banded(read_suite(bare), [criterion])
    assert (measured.value, measured.band, measured.follow_up) == (None, None, None)
    assert "not comparable: " in measured.sentence()
