"""The loss-only probe of noise strategies: drawn, paired and tested, with no training and nothing left behind."""

import json

import pytest
import torch

from fp4rl.cli.main import main
from fp4rl.diagnose.calibration import calibrate_answers, from_tokens
from fp4rl.diagnose.noise_loss import noise_losses
from fp4rl.diagnose.passes import reference_of
from fp4rl.lab.catalogue import entry
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import arm_contents, load_spec
from fp4rl.spec.model import Embedded
from fp4rl.spec.noise import Noise

W4A16 = Injection.named("w4a16")
LINEAR = Noise(targets={"kinds": ["linear"]}, operation="multiplicative")


def test_noise_of_a_ruinous_size_raises_the_loss_and_none_leaves_it(trained, tokens):
    noises = {"none": None, "zero": Noise(control="sigma_zero"), "large": Noise()}
    few = from_tokens(tokens[:8])
    found = noise_losses(trained, W4A16, noises, few, sigma=1.0, draws=3)
    assert len(set(found["none"])) == 1
    assert min(found["large"]) > found["none"][0] + 0.1
    assert len(set(found["large"])) == 3


def test_linear_noise_reaches_the_rounded_copies_and_leaves_no_stale_one(trained, tokens):
    """Without telling the attachment, the first rounded copies would answer for every draw."""
    few = from_tokens(tokens[:4])
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    found = noise_losses(trained, W4A16, {"linear": LINEAR, "none": None}, few, sigma=0.3, draws=2)
    assert len({*found["linear"], *found["none"]}) == 3
    assert all(torch.equal(p, before[name]) for name, p in trained.named_parameters())
    fresh = noise_losses(trained, W4A16, {"none": None}, few, sigma=0.3, draws=2)
    assert found["none"] == fresh["none"]


def test_without_an_injection_the_model_itself_is_probed(trained, tokens):
    few = from_tokens(tokens[:4])
    found = noise_losses(trained, None, {"none": None}, few, sigma=0.1, draws=2)
    clean = sum(reference_of(trained, b).loss * int(b.mask.sum()) for b in few.batches) / few.tokens
    assert found["none"][0] == pytest.approx(clean)


def test_the_loss_counts_the_answers_alone():
    tokenizer = build_tokenizer()
    found = calibrate_answers(tokenizer, [("Q: 1 + 2 A:", "3"), ("Q: 1 A:", "1 1")])
    (batch,) = found.batches
    counted = [tokenizer.decode(row[1:][places]) for row, places in zip(batch.ids, batch.predicted, strict=True)]
    assert sorted(word.strip() for word in counted) == ["1 1", "3"]


def test_one_draw_is_refused(trained, tokens):
    with pytest.raises(InvalidValueError, match="no spread"):
        noise_losses(trained, None, {"none": None}, from_tokens(tokens[:1]), sigma=0.1, draws=1)


def test_the_suite_of_strategies_differs_in_noise_alone():
    suite = load_spec(entry("aqn_strategies").path)
    arms = dict(arm_contents(suite))
    assert list(arms) == ["no_aqn", "global", "targeted", "healthy_only", "variable", "inverse"]
    assert len({digest(arm.model_copy(update={"noise": None})) for arm in arms.values()}) == 1
    targeted, control = (dict(arms[name].noise.multipliers.by_layer) for name in ("targeted", "healthy_only"))
    assert all(targeted[layer] + control[layer] == 1.0 for layer in range(4))


def test_the_verb_prints_a_paired_test_per_arm(tmp_path, capsys):
    folder = tmp_path / "model"
    tokenizer = build_tokenizer()
    build(Embedded(seed=3), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"suite: probe\nbase: {{model: {{path: {folder}}}, injection: w4a16}}\n"
        "arms: {quiet: {}, loud: {noise: {schedule: {kind: constant, sigma: 0.5}}}}\n"
    )
    assert main(["schedule", str(suite), "--loss", "4", "--json", "--runs", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)["losses"]
    quiet, loud = found["arms"]
    assert found["against"] == "quiet"
    assert found["sigma"] == 0.5
    assert quiet["difference"] is None
    assert loud["low"] < loud["difference"] < loud["high"]
    assert main(["schedule", str(suite), "--sigma", "0.1"]) == 2
    assert "--loss" in capsys.readouterr().err
