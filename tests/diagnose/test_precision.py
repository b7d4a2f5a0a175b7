"""Errors of real trained weights and of the inputs they meet, beside the ideal of the format."""

import copy

import pytest
import torch

from fp4rl.diagnose.calibration import from_tokens
from fp4rl.diagnose.precision import (
    ideal_measures,
    input_errors,
    rounding_error,
    stored_weight_errors,
    weight_errors,
    weights_of,
)
from fp4rl.inject.attach import attach
from fp4rl.inject.resolve import resolve
from fp4rl.numerics.errors import ErrorSums, pooled, round_piece
from fp4rl.spec.errors import NotFinite
from fp4rl.spec.formats import FORMATS, MXFP4, NVFP4
from fp4rl.spec.injection import Injection


@pytest.mark.parametrize(
    ("mode", "l1", "sqnr_db", "dead"),
    [("w4a16", 0.107, 18.75, 0.085), ("nvfp4_w4a16", 0.089, 20.44, 0.068)],
)
def test_the_trained_model_gives_the_published_figures(stories, mode, l1, sqnr_db, dead):
    parts, tallies = weight_errors(stories, resolve(stories, Injection.named(mode, dtype="float32")))
    found = pooled(list(tallies.values())).measures()
    assert len(parts) == 35
    assert found["relative_l1"] == pytest.approx(l1, abs=0.0006)
    assert found["sqnr_db"] == pytest.approx(sqnr_db, abs=0.01)
    assert found["deadzone_share"] == pytest.approx(dead, abs=0.0006)


def test_an_ideal_tensor_lies_at_its_own_ideal_and_a_heavy_tail_above_it():
    generator = torch.Generator().manual_seed(3)
    for values, low, high in ((torch.randn(512, 1024, generator=generator), 0.99, 1.01), (None, 1.05, 3.0)):
        x = torch.randn(512, 1024, generator=generator) ** 3 if values is None else values
        tally = ErrorSums()
        tally.add(round_piece(x.bfloat16(), MXFP4))
        assert low < tally.measures()["relative_l2"] / ideal_measures(MXFP4)["relative_l2"] < high


def test_gaussian_data_in_mxfp4_has_the_measured_error():
    """Averaged over where in an octave the data lie; at unit variance alone it is 11.40 % and 10.49 %."""
    ideal = ideal_measures(MXFP4)
    assert ideal["relative_l2"] == pytest.approx(0.1155, abs=0.0005)
    assert ideal["relative_l1"] == pytest.approx(0.1068, abs=0.0005)
    assert ideal_measures(NVFP4)["relative_l2"] == pytest.approx(0.0952, abs=0.0005)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp4_2d", "fp8", "mxfp4_dual"])
def test_a_weight_in_pieces_has_the_error_of_the_whole(trained, name, monkeypatch):
    monkeypatch.setattr("fp4rl.diagnose.precision.PIECE", 64 * 32)
    table = resolve(trained, Injection(weight=FORMATS[name]))
    plan = next(plan for plan in table.plans if plan.name.endswith("0.mlp.gate_proj"))
    weight = weights_of(trained, plan)[0]
    whole = ErrorSums()
    seen = weight.bfloat16()
    whole.add(round_piece(seen, FORMATS[name]))
    pieces, largest = rounding_error(lambda n: iter(weight.split(n)), plan, table)
    assert pieces.measures() == pytest.approx(whole.measures(), rel=1e-12)
    assert largest == float(seen.abs().max())


def test_a_scan_measures_what_the_injection_does(trained, tokens):
    """The error that a scan states for an input is the one that the attached model makes (check P15)."""
    table = resolve(trained, Injection.named("w16a4"))
    (scanned,) = [p for p in input_errors(trained, table, from_tokens(tokens[:4])) if "0.self_attn.q" in p.site]
    with attach(trained, table) as injected, torch.no_grad():
        injected.set_phase("evaluation")
        trained(torch.tensor(tokens[:4]))
        seen = [row for row in injected.evidence() if row.site == scanned.site]
    assert seen[0].relative_error == pytest.approx(scanned.measures["relative_l2"], rel=0.1)


def test_the_residual_stream_has_another_error_than_what_is_rounded(trained, tokens):
    """The fault that was made: the stream was scanned, which no run rounds; where it has an outlier it looks unlike."""
    model, stream = copy.deepcopy(trained), []
    model.model.embed_tokens.weight.data[:, 0] += 3.0
    model.model.layers[0].input_layernorm.weight.data[0] = 1e-3  # what reads the stream does without its outlier
    table = resolve(model, Injection.named("w16a4"))
    (scanned,) = [p for p in input_errors(model, table, from_tokens(tokens[:4])) if "0.self_attn.q" in p.site]
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, given: stream.append(given[0].detach()))
    with torch.no_grad():
        model(torch.tensor(tokens[:4]))
    hook.remove()
    tally = ErrorSums()
    tally.add(round_piece(stream[0].flatten(0, 1), MXFP4))
    assert tally.measures()["deadzone_share"] > 2 * scanned.measures["deadzone_share"]
    with attach(model, table) as injected, torch.no_grad():
        injected.set_phase("evaluation")
        model(torch.tensor(tokens[:4]))
        seen = [row for row in injected.evidence() if row.site == scanned.site]
    assert seen[0].relative_error == pytest.approx(scanned.measures["relative_l2"], rel=0.1)


def test_padding_does_not_count(trained, tokens):
    table = resolve(trained, Injection.named("w16a4"))
    ragged = [tokens[0], tokens[1][:7]]
    together = input_errors(trained, table, from_tokens(ragged, batch_size=2))
    apart = input_errors(trained, table, from_tokens(ragged, batch_size=1))
    for a, b in zip(together, apart, strict=True):
        assert a.measures["relative_l2"] == pytest.approx(b.measures["relative_l2"], rel=2e-3)


def test_a_width_that_the_block_does_not_divide_is_marked(w4a4):
    short = {part.site for part in w4a4.parts if part.short_block}
    assert short == {f"model.layers.{i}.mlp.down_proj" for i in range(5)}
    assert {part.short_block for part in w4a4.parts if part.site in short} == {172 % 32}


def test_weights_that_are_not_finite_are_named(trained):
    from copy import deepcopy

    broken = deepcopy(trained)
    broken.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NotFinite, match=r"layers\.2\.mlp\.up_proj: holds NaN"):
        weight_errors(broken, resolve(broken, Injection.named("w4a16")))


def test_a_checkpoint_on_disk_scans_like_the_loaded_model(trained, tmp_path):
    from fp4rl.models.tokenizer import build_tokenizer

    trained.save_pretrained(tmp_path, max_shard_size="400KB")
    build_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    injection = Injection.named("nvfp4_w4a16")
    table, stored, _ = stored_weight_errors(tmp_path, injection)
    live, _ = weight_errors(trained, resolve(trained, injection))
    assert table.digest == resolve(trained, injection).digest
    assert stored == live


def test_merged_adapters_are_part_of_the_weight_that_is_scanned(trained):
    peft = pytest.importorskip("peft")
    from copy import deepcopy

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(deepcopy(trained), config)
    table = resolve(
        wrapped, Injection.named("w4a16", lora="merged", fused_groups="free", targets={"take": ["*q_proj"]})
    )
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.allclose(weights_of(wrapped, table.plans[0])[0], expected, atol=1e-6)
