"""Two scans or checkpoints: identical ones are flagged, since an adapter that was not loaded looks like this."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file

from fp4rl.diagnose.compare import compare_checkpoints, compare_scans, require_difference, totals
from fp4rl.diagnose.scan import scan
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.injection import Injection
from fp4rl.spec.scan import Scan


@pytest.fixture
def folders(tmp_path):
    weights = {"a": torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), "b": torch.zeros(3)}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    return tmp_path / "one", tmp_path / "two", weights


def test_identical_checkpoints_are_flagged(folders):
    one, two, _ = folders
    with pytest.raises(CheckFailed, match="adapters not loaded"):
        require_difference(compare_checkpoints(one, two).identical, "they")


def test_a_single_changed_value_is_a_difference_with_its_size(folders):
    one, two, weights = folders
    changed = weights["a"].clone()
    changed[3, 3] += 0.5
    save_file({**weights, "a": changed}, two / "model.safetensors")
    found = compare_checkpoints(one, two)
    require_difference(found.identical, "they")
    delta = next(t for t in found.tensors if t.name == "a")
    assert delta.share_changed == 1 / 64
    assert delta.relative == pytest.approx(0.5 / float(weights["a"].norm()))


def test_tensors_of_one_side_alone_and_other_shapes_are_named(folders):
    one, two, weights = folders
    save_file({**weights, "extra": torch.ones(2)}, two / "model.safetensors")
    assert compare_checkpoints(one, two).only_b == ("extra",)
    save_file({"a": torch.ones(4, 4)}, two / "model.safetensors")
    with pytest.raises(InvalidValueError, match=r"a is \[8, 8\]"):
        compare_checkpoints(one, two)


def _scanned(model):
    return scan(model, Injection.named("w4a16"), spec=Scan(parts=("precision",))).as_dict()


def test_two_scans_of_one_model_are_identical_and_flagged(trained):
    with pytest.raises(CheckFailed, match="identical to the last bit"):
        require_difference(
            all(row.a == row.b for row in compare_scans(_scanned(trained), _scanned(trained))), "the scans"
        )


def test_scans_of_different_weights_are_told_apart(trained):
    other = deepcopy(trained)
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight[0] *= 30
    changed = compare_scans(_scanned(trained), _scanned(other))
    require_difference(all(row.a == row.b for row in changed), "the scans")
    assert {row.site for row in changed if row.a != row.b} == {"model.layers.1.self_attn.q_proj"}


def test_whole_figures_stand_side_by_side(w4a4):
    ours = json.loads(json.dumps(w4a4.as_dict()))
    theirs = json.loads(json.dumps(ours))
    theirs["sensitivity"]["everything"]["kl"] += 1.0
    for site in theirs["sensitivity"]["sites"]:
        if site["layer"] == 3:
            site["leave_one_in"]["kl"] += 1.0
    found = {total.name: total.b - total.a for total in totals(ours, theirs)}
    assert found.pop("KL of everything, nats") == pytest.approx(1.0)
    assert found.pop("KL of layer 3's sites, nats") == pytest.approx(7.0)
    assert set(found.values()) == {0.0}
    assert "weights: SQNR, dB" in found
    assert totals({"parts": []}, theirs) == ()
    for site in theirs["sensitivity"]["sites"]:  # as files of schema 1 have it
        site["alone"], site["spared"] = site.pop("leave_one_in"), site.pop("leave_one_out")
    assert {total.name: total.b - total.a for total in totals(ours, theirs)}[
        "KL of layer 3's sites, nats"
    ] == pytest.approx(7.0)


def test_scans_that_share_nothing_are_refused():
    with pytest.raises(InvalidValueError, match="share no site"):
        compare_scans({"parts": []}, {"parts": []})


def test_the_report_is_json_and_keeps_its_keys(w4a4):
    found = json.loads(json.dumps(w4a4.as_dict(), allow_nan=False))
    assert found["schema"] == 2
    assert set(found) == {
        *("schema", "model", "injection", "sites_digest", "sites", "calibration", "weights_together"),
        *("parts", "sensitivity", "depth", "dynamics", "distribution"),
    }
    assert set(found["parts"][0]) == {
        *("site", "layer", "role", "part", "format", "shape", "short_block", "measures", "ideal", "excess", "experts"),
    }
    assert found["calibration"]["texts"] == 32
