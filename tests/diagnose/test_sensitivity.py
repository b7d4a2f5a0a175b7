"""What an error does to the output, measured and estimated, and how it grows with depth."""

from dataclasses import replace

import pytest
import torch

from fp4rl.diagnose.calibration import from_tokens
from fp4rl.diagnose.depth import depth
from fp4rl.diagnose.estimate import estimated_kl, output_error
from fp4rl.diagnose.passes import divergence_of, reference_of
from fp4rl.diagnose.sensitivity import rank_correlation, sensitivity
from fp4rl.inject.attach import attach
from fp4rl.inject.resolve import resolve
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import Injection


def _generator():
    return torch.Generator().manual_seed(0)


def test_the_estimate_of_one_backward_pass_ranks_sites_as_measuring_does(w4a4):
    assert w4a4.sensitivity.rank_correlation > 0.8


def test_the_estimate_is_near_the_measured_kl_in_size_too(w4a4):
    estimated = sum(site.estimate for site in w4a4.sensitivity.sites)
    measured = sum(site.leave_one_in.kl for site in w4a4.sensitivity.sites)
    assert estimated == pytest.approx(measured, rel=0.25)


def test_labels_of_the_text_instead_of_the_models_own_answers_would_not_be_a_kl(w4a4, trained, tokens, monkeypatch):
    """The planted defect: the Fisher information needs answers drawn from the model, not the most likely ones."""

    def likeliest(logits, batch, _generator):
        log_probs = torch.log_softmax(logits[batch.mask.bool()].float(), -1)
        return log_probs.max(-1).values.sum()

    short = from_tokens([row[:4] for row in tokens[:256]], batch_size=64)  # what begins is the least certain
    found = sensitivity(trained, w4a4.table, short, leave_one_out=False, generator=_generator())
    measured = sum(site.leave_one_in.kl for site in found.sites)
    assert sum(site.estimate for site in found.sites) == pytest.approx(measured, rel=0.2)
    monkeypatch.setattr("fp4rl.diagnose.estimate.log_prob_of_own_answers", likeliest)
    wrong = estimated_kl(trained, w4a4.table, short, generator=_generator(), draws=1)
    assert sum(wrong.values()) != pytest.approx(measured, rel=0.2)


def test_the_estimate_leaves_no_gradient_and_works_on_frozen_weights(trained, tokens):
    table = resolve(trained, Injection.named("w4a16"))
    few = from_tokens(tokens[:4])
    before = estimated_kl(trained, table, few, generator=_generator())
    assert all(parameter.grad is None for parameter in trained.parameters())
    trained.requires_grad_(False)
    try:
        frozen = estimated_kl(trained, table, few, generator=_generator())
    finally:
        trained.requires_grad_(True)
    assert frozen == pytest.approx(before, rel=1e-4)


def test_a_measured_kl_is_that_of_the_attached_model(w4a4, trained, calibration):
    plan = w4a4.table.plans[3]
    batch = calibration.batches[0]
    reference = reference_of(trained, batch)
    with attach(trained, replace(w4a4.table, plans=(plan,))) as injected:
        injected.set_phase("evaluation")
        alone = divergence_of(trained, batch, reference)
    assert alone.kl == pytest.approx(w4a4.sensitivity.sites[3].leave_one_in.kl, rel=0.5)
    assert divergence_of(trained, batch, reference).kl == pytest.approx(0.0, abs=1e-6)


def test_leaving_a_site_out_is_measured_against_rounding_everything(trained, tokens):
    table = resolve(
        trained, Injection.named("w4a16", targets={"take": ["*.0.mlp.up_proj", "*.4.mlp.up_proj"]}, fused_groups="free")
    )
    found = sensitivity(trained, table, from_tokens(tokens[:4]), leave_one_out=True, generator=_generator())
    first, last = found.sites
    # Of two sites, what leaving one out saves is everything minus what the other does alone.
    assert first.leave_one_out.kl == pytest.approx(found.everything.kl - last.leave_one_in.kl, abs=1e-7)


def test_what_rounding_adds_to_an_output_is_the_difference_of_the_injected_layer(trained):
    table = resolve(trained, Injection.named("w4a4"))
    plan = table.plans[0]
    layer = trained.get_submodule(plan.site.path)
    x = torch.randn(5, 64, generator=_generator())
    expected = layer(x)
    error = output_error(x, layer, plan, torch.bfloat16)
    with attach(trained, table) as injected, torch.no_grad():
        injected.set_phase("evaluation")
        assert torch.allclose(layer(x) - expected, error, atol=1e-6)


def test_rank_correlation_is_spearmans():
    assert rank_correlation([1, 2, 3, 4], [10, 100, 1000, 1001]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)  # scipy.stats.spearmanr
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_the_error_of_the_stream_splits_into_weights_and_inputs(w4a4):
    assert [found.layer for found in w4a4.depth] == [0, 1, 2, 3, 4]
    assert all(found.both > 0 for found in w4a4.depth)
    for found in w4a4.depth:
        assert max(found.weights, found.inputs) < found.both
        assert found.both == pytest.approx(found.predicted, rel=0.3)


def test_a_weight_only_mode_adds_nothing_through_inputs(trained, tokens):
    found = depth(trained, resolve(trained, Injection.named("w4a16")), from_tokens(tokens[:4]))
    assert all(layer.inputs == 0.0 and layer.both == layer.weights for layer in found)


def test_a_model_without_numbered_layers_has_no_depth():
    model = torch.nn.Sequential()
    model.add_module("up", torch.nn.Linear(32, 32))
    with pytest.raises(InvalidValueError, match="no numbered layers"):
        depth(model, resolve(model, Injection.named("w4a16")), from_tokens([[1]]))


@pytest.mark.slow
def test_the_estimate_ranks_the_sites_of_the_embedded_trained_model_as_measuring_does(tmp_path):
    from fp4rl.diagnose.calibration import calibrate
    from fp4rl.diagnose.scan import scan
    from fp4rl.models.load import load
    from fp4rl.rl.inputs import warmed_up
    from fp4rl.spec.model import Embedded
    from fp4rl.spec.scan import Scan
    from fp4rl.tasks.arithmetic import Arithmetic

    model, tokenizer = load(warmed_up(Embedded(), Arithmetic(), tmp_path), "float32")
    texts = [f"{p.prompt} {p.solution}" for p in Arithmetic().problems("train", 32)]
    for mode in ("w4a16", "w4a4"):
        report = scan(
            model, Injection.named(mode), texts=calibrate(tokenizer, texts), spec=Scan(parts=("sensitivity",))
        )
        assert report.sensitivity.rank_correlation >= 0.8
