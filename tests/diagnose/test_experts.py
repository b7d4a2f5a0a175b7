"""A scan of a mixture of experts: its stacks are weights like others, and what is wrong in one expert is seen."""

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from fp4rl.diagnose.advice import Options, advise
from fp4rl.diagnose.calibration import Batch, Calibration
from fp4rl.diagnose.scan import scan
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection
from fp4rl.spec.scan import Scan

STACKS = {f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")}


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(
        head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, vocab_size=50, **shape
    )
    made = Qwen3MoeForCausalLM(config).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.fixture
def calibration():
    ids = torch.randint(3, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    return Calibration((Batch(ids, ones := torch.ones_like(ids), ones),), 4, 64, "made here")


def scanned(model, calibration, **spec):
    parts = ("precision", "sensitivity")
    return scan(model, Injection.named("w4a4"), texts=calibration, spec=Scan(parts=parts, **spec))


def test_every_stack_has_the_error_of_its_experts_together(model, calibration):
    report = scanned(model, calibration)
    found = {part.site: part.measures["relative_l2"] for part in report.parts if part.site in STACKS}
    assert found.keys() == STACKS
    for site, error in found.items():
        weight = model.get_parameter(site).detach().bfloat16()
        rounded = torch.stack([fake_quantize(expert.contiguous(), MXFP4) for expert in weight]).float()
        assert error == pytest.approx(float((rounded - weight).norm() / weight.float().norm()), rel=1e-5)


@pytest.mark.parametrize("measured", [True, False])
def test_every_stack_has_a_measured_kl(model, calibration, measured):
    """Fault: without `measured` the KL of experts was 0, so that no advice ever widened them."""
    sites = {site.name: site for site in scanned(model, calibration, measured=measured).sensitivity.sites}
    assert sites.keys() > STACKS
    assert all(site.kl > 0 for site in sites.values())
    assert all(sites[name].estimate is None for name in STACKS)


def test_advice_chooses_a_format_for_every_stack(model, calibration):
    """Fault: KeyError 'model.layers.0.mlp.experts.gate_up_proj'."""
    report = scanned(model, calibration)
    for bits, formats in ((4.5, {"mxfp4", "mxfp8", "bf16"}), (17.0, {"bf16"})):
        chosen = advise(report, model, calibration, Options(bits_per_weight=bits)).formats.chosen.choices
        assert chosen.keys() >= STACKS
        assert {choice.format for choice in chosen.values()} <= formats


def test_one_damaged_expert_stands_out(model, calibration):
    """Planted: 1 of 32 values of one expert 50 times as large; it went unseen under the heading 'all weights'."""
    damaged = "model.layers.1.mlp.experts.down_proj"
    with torch.no_grad():
        model.get_parameter(damaged)[2].view(-1)[::32] *= 50
    report = scanned(model, calibration)
    worst = max(
        (part for part in report.parts if part.part == "weight"), key=lambda part: part.measures["deadzone_share"]
    )
    assert worst.site == damaged
    sound = [part.measures["deadzone_share"] for part in report.parts if part.part == "weight" and part.site != damaged]
    assert worst.measures["deadzone_share"] > 2 * max(sound)
