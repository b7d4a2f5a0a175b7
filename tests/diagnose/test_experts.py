"""A scan of a mixture of experts: its stacks are weights like others, and what is wrong in one expert is seen."""

import copy
from dataclasses import astuple

import pytest
import torch
import zoo_oracle
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fp4rl.diagnose.advice import Options, advise
from fp4rl.diagnose.calibration import Batch, Calibration
from fp4rl.diagnose.findings import findings, standing_out
from fp4rl.diagnose.page import page
from fp4rl.diagnose.precision import stored_weight_errors
from fp4rl.diagnose.scan import scan
from fp4rl.models.tokenizer import build_tokenizer
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
    found = {
        part.site: part.measures["relative_l2"]
        for part in report.parts
        if part.site in STACKS and part.part == "weight"
    }
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


@pytest.mark.parametrize("way", ["grouped_mm", "eager", "batched_mm"])
def test_the_inputs_of_every_expert_are_those_of_the_experts_written_out(way, model):
    """Kind: what an expert is given went unmeasured. Padding, which a router sends somewhere too, is no token."""
    model.set_experts_implementation(way)
    ids = torch.randint(3, 50, (4, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 11:] = mask[2, 5:] = 0
    report = scanned(model, Calibration((Batch(ids, mask, mask),), 4, int(mask.sum()), "made here"))

    given = {}
    twin = copy.deepcopy(model)
    for layer, block in enumerate(twin.model.layers):
        block.mlp.experts.forward = lambda *args, m=block.mlp.experts, n=layer: written_out(m, n, given, *args)
    for row, real in zip(ids, mask, strict=True):
        with torch.no_grad():
            twin(row[real.bool()][None], use_cache=False)

    inputs = {part.site: part for part in report.parts if part.part == "input" and part.site in STACKS}
    assert inputs.keys() == STACKS
    for site, part in inputs.items():
        layer, name = int(site.split(".")[2]), site.rpartition(".")[2]
        own = {e: torch.cat(rows) for (n, kind, e), rows in given.items() if (n, kind) == (layer, name)}
        assert {e.expert: e.tokens for e in part.experts} == {e: len(rows) for e, rows in own.items()}
        for e in part.experts:
            assert e.relative_l2 == pytest.approx(error_of(own[e.expert]), rel=2e-3)
            assert e.largest == pytest.approx(float(own[e.expert].bfloat16().abs().max()), rel=1e-2)
        assert part.measures["relative_l2"] == pytest.approx(error_of(torch.cat(list(own.values()))), rel=2e-3)
    assert sum(e.tokens for e in inputs["model.layers.0.mlp.experts.down_proj"].experts) == 2 * int(mask.sum())


def written_out(module, layer, given, hidden, chosen, shares):
    """Every token and every expert of it, one after the other, in float64."""
    out = torch.zeros_like(hidden, dtype=torch.float64)
    for token, experts in enumerate(chosen.tolist()):
        for place, e in enumerate(experts):
            x = hidden[token : token + 1].double()
            gate, up = (x @ module.gate_up_proj[e].double().T).chunk(2, -1)
            h = torch.nn.functional.silu(gate) * up
            given.setdefault((layer, "gate_up_proj", e), []).append(x)
            given.setdefault((layer, "down_proj", e), []).append(h)
            out[token] += (shares[token, place].double() * (h @ module.down_proj[e].double().T))[0]
    return out.to(hidden.dtype)


def error_of(rows):
    seen = rows.bfloat16().double()
    return float((zoo_oracle.mxfp4(seen) - seen).norm() / seen.norm())


def test_a_whole_expert_of_another_size_is_named(model, calibration):
    """Planted: all weights of one expert times 50, which a scale per block takes without a larger error."""
    site = "model.layers.1.mlp.experts.gate_up_proj"
    assert not [f for f in findings(scanned(model, calibration)) if "median expert" in f.text]
    with torch.no_grad():
        model.get_parameter(site)[2] *= 50
    report = scanned(model, calibration)
    named = [finding.text for finding in findings(report) if "median expert" in finding.text]
    assert any(text.startswith(f"the weight of expert 2 of {site}") for text in named)
    assert report.expert_rows(3)[0][:2] in ((site, "2"), (site.replace("gate_up", "down"), "2"))
    assert not any(f"expert {e} " in text for text in named for e in (0, 1, 3))


def test_an_outlier_that_reaches_only_one_experts_tokens_is_named(model, calibration):
    """Planted: one channel that expert 2 alone hands on, 60 times as large."""
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[2, 32 + 5] *= 60
    site = "model.layers.1.mlp.experts.down_proj"
    report = scanned(model, calibration)
    named = [finding.text for finding in findings(report) if finding.text.startswith("the inputs (")]
    assert [f"of expert 2 of {site}" in text for text in named] == [True]
    inputs = next(part for part in report.parts if (part.site, part.part) == (site, "input"))
    zeroed = {e.expert: e.deadzone_share for e in inputs.experts}
    assert zeroed[2] > 2 * max(share for e, share in zeroed.items() if e != 2)


def test_a_part_of_one_expert_makes_its_stack_stand_out(model, calibration):
    site = "model.layers.0.mlp.experts.down_proj"
    with torch.no_grad():
        rows = model.get_parameter(site)[1]
        rows.copy_(torch.where(torch.rand_like(rows) < 0.03, 30 * rows, rows).sign() * 5 ** rows.abs())
    report = scanned(model, calibration)
    part = next(part for part in report.parts if (part.site, part.part) == (site, "weight"))
    assert part.worst_expert == max(e.relative_l2 for e in part.experts) / part.ideal["relative_l2"]
    assert (site in standing_out(report, limit=0.999 * part.worst_expert)) is True


def test_load_and_errors_stand_on_the_page_and_in_the_json(model, calibration):
    report = scanned(model, calibration)
    entry = next(p for p in report.as_dict()["parts"] if p["site"] in STACKS and p["part"] == "input")
    assert [set(e) for e in entry["experts"]] == [{"expert", "largest", "relative_l2", "deadzone_share", "tokens"}] * 4
    rows = report.expert_rows(100)
    assert len(rows) == 4 * len(STACKS)
    html = page(report)
    assert "Experts one by one" in html
    assert all(row[2] in html for row in rows)
    assert any(finding.text.startswith("an expert was given ") for finding in findings(report))


@pytest.mark.parametrize("kind", ["an expert a tensor", "stacked, [in, out]"])
def test_the_files_of_a_mixture_tell_what_its_model_tells(kind, model, tmp_path):
    """Kind: `weights_only` left experts out."""
    if kind != "an expert a tensor":
        shape = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = GptOssConfig(
            head_dim=16, num_local_experts=4, num_experts_per_tok=2, intermediate_size=128, vocab_size=50, **shape
        )
        model = GptOssForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    injection = Injection.named("w4a16")
    live = scan(model, injection, spec=Scan(parts=("precision",))).parts
    _, parts, _ = stored_weight_errors(tmp_path, injection)
    assert [part.site for part in parts] == [part.site for part in live]
    for stored, known in zip(parts, live, strict=True):  # gate and up lie in files of their own: other partial sums
        assert dict(stored.measures) == pytest.approx(dict(known.measures), rel=1e-9)
        for ours, theirs in zip(stored.experts, known.experts, strict=True):
            assert astuple(ours)[:4] == pytest.approx(astuple(theirs)[:4], rel=1e-9)
            assert ours.tokens is theirs.tokens is None
    assert any(len(part.experts) == 4 for part in parts)
