"""What rounding one expert alone does to the output, against experts written out in float64 and weights that are put
into the model by hand; and which experts a scan leaves unmeasured."""

import copy

import pytest
import torch
import zoo_families
import zoo_oracle
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from fp4rl.diagnose.calibration import Batch, Calibration
from fp4rl.diagnose.findings import findings
from fp4rl.diagnose.page import page
from fp4rl.diagnose.scan import scan
from fp4rl.diagnose.sensitivity import rank_correlation
from fp4rl.spec.injection import Injection
from fp4rl.spec.scan import Scan

ALL = 1000
WAYS = ("grouped_mm", "eager", "batched_mm")


@pytest.fixture
def model():
    return mixture()


def mixture(way="grouped_mm"):
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(
        head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, vocab_size=50, **shape
    )
    made = Qwen3MoeForCausalLM(config).eval()
    made.set_experts_implementation(way)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def texts(count=4, padded=True):
    """Texts of 16 tokens; two of them shorter, padded on the right."""
    ids = torch.randint(3, 50, (count, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 11:] = mask[2, 5:] = 0
    return Calibration((Batch(ids, mask, mask),), count, int(mask.sum()), "made here")


def scanned(model, calibration, mode="w4a4", **spec):
    spec = {"parts": ("precision", "sensitivity"), "measured_experts": ALL} | spec
    return scan(model, Injection.named(mode), texts=calibration, spec=Scan(**spec))


def experts_of(report):
    return {(e.site, e.expert): e for e in report.sensitivity.experts}


def logits_of(model, calibration):
    """Log-probabilities of every text by itself, without padding."""
    rows = zip(calibration.batches[0].ids, calibration.batches[0].mask, strict=True)
    with torch.no_grad():
        each = [model(row[real.bool()][None], use_cache=False).logits[0] for row, real in rows]
    return torch.cat(each).double().log_softmax(-1)


def kl_of(p, q):
    """KL(p || q) in nats a token, of log-probabilities in float64."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def one_rounded(model, layer, name, number):
    """A twin in which one matrix of one expert is multiplied with both operands rounded, every token by itself."""
    twin = copy.deepcopy(model)

    def product(name_here, expert, x, weight):
        if (name_here, expert) != (name, number):
            return x @ weight.T
        rounded = [zoo_oracle.mxfp4(operand.bfloat16().double()) for operand in (x, weight)]
        return rounded[0] @ rounded[1].T

    def forward(module, hidden, chosen, shares):
        out = torch.zeros_like(hidden)
        for token, experts in enumerate(chosen.tolist()):
            for place, e in enumerate(experts):
                gate, up = product("gate_up_proj", e, hidden[token : token + 1], module.gate_up_proj[e]).chunk(2, -1)
                h = torch.nn.functional.silu(gate) * up
                out[token] += (shares[token, place] * product("down_proj", e, h, module.down_proj[e]))[0]
        return out

    block = twin.model.layers[layer].mlp.experts
    block.forward = lambda *args: forward(block, *args)
    return twin


@pytest.mark.parametrize("way", WAYS)
def test_the_kl_of_one_expert_alone_is_that_of_experts_written_out(way):
    """Kind: only the pooled effect of a stack was known. Padding is given to experts too, and does nothing."""
    model, calibration = mixture(way), texts()
    found = experts_of(scanned(model, calibration))
    assert model.config._experts_implementation == way  # whatever the scan ran it in
    assert len(found) == 2 * 2 * 4
    exact = mixture("eager").double()
    plain = logits_of(exact, calibration)
    for (site, number), expert in found.items():
        layer, name = int(site.split(".")[2]), site.rpartition(".")[2]
        wanted = kl_of(plain, logits_of(one_rounded(exact, layer, name, number), calibration))
        assert wanted > 1e-6
        assert expert.leave_one_in.kl == pytest.approx(wanted, rel=0.02), (site, number)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "mixtral", "deepseek_v3"])
def test_every_layout_gives_the_kl_of_a_weight_that_is_rounded_by_hand(family):
    """W4A16: the same as the rounded expert in its place, along the inputs, whichever way it is stored."""
    model = zoo_families.tiny(family)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    calibration = texts(padded=False)
    found = experts_of(scanned(model, calibration, "w4a16", parts=("sensitivity",)))
    transposed = family in ("gpt_oss", "llama4_text")
    assert len(found) >= 8
    per_token = model.config.num_experts_per_tok
    for stack in {site for site, _ in found}:
        assert sum(e.tokens for (site, _), e in found.items() if site == stack) == per_token * calibration.tokens
    plain = logits_of(model, calibration)
    for (site, number), expert in found.items():
        twin = copy.deepcopy(model)
        weight = twin.get_parameter(site)[number].detach()
        read = weight.T if transposed else weight
        rounded = zoo_oracle.mxfp4(read.bfloat16().double().contiguous()).to(weight.dtype)
        weight.copy_(rounded.T if transposed else rounded)
        assert expert.leave_one_in.kl == pytest.approx(kl_of(plain, logits_of(twin, calibration)), rel=0.02, abs=1e-7)
    assert max(e.kl for e in found.values()) > 1e-6


@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_one_backward_pass_estimates_what_is_measured_of_every_expert(mode, model):
    """The estimates order the experts nearly as measuring does, and add up to nearly the same."""
    each = scanned(model, texts(64), mode, parts=("sensitivity",)).sensitivity.experts
    estimates, measured = [e.estimate for e in each], [e.leave_one_in.kl for e in each]
    assert rank_correlation(estimates, measured) > 0.9
    assert sum(estimates) == pytest.approx(sum(measured), rel=0.25)


def test_the_estimate_leaves_no_gradient_and_works_on_frozen_weights(model):
    before = experts_of(scanned(model, texts(), measured_experts=0))
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen = experts_of(scanned(model.requires_grad_(False), texts(), measured_experts=0))
    assert all(frozen[key].estimate == pytest.approx(e.estimate, rel=1e-4) for key, e in before.items())


@pytest.mark.parametrize("share", [1, 32], ids=["whole", "1 of 32 values"])
@pytest.mark.parametrize(("layer", "name"), [(0, "down_proj"), (1, "gate_up_proj")])
def test_an_expert_that_is_damaged_comes_first_in_sensitivity_and_in_the_table(layer, name, share, model):
    """Planted: one matrix of one expert 50 times as large, or one of 32 of its values. Both matrices of the expert
    suffer: what gate and up return is the input of down, and down magnifies what was rounded before it."""
    stack = f"model.layers.{layer}.mlp.experts."
    both = {(stack + "gate_up_proj", 2), (stack + "down_proj", 2)}
    sound = scanned(model, texts(16), measured=False)
    assert {(e.site, e.expert) for e in sound.sensitivity.experts[:2]} != both
    with torch.no_grad():
        model.get_parameter(stack + name)[2].view(-1)[::share] *= 50
    for measured in (True, False):
        report = scanned(model, texts(16), measured=measured, measured_experts=2)
        first, second, third = report.sensitivity.experts[:3]
        assert {(first.site, first.expert), (second.site, second.expert)} == both
        assert first.kl > second.kl > 2 * third.kl
        assert [e.leave_one_in is not None for e in (first, second, third)] == [measured, measured, False]
        assert {row[:2] for row in report.expert_rows(2)} == {(site, "2") for site, _ in both}
        assert any(f.text.startswith(f"expert 2 of {first.site} does most") for f in findings(report))


def test_what_is_measured_estimated_and_unknown_is_told_on_the_page_and_in_the_json(model):
    ids = torch.tensor([[7]])
    one_token = Calibration((Batch(ids, torch.ones_like(ids), torch.ones_like(ids)),), 1, 1, "made here")
    report = scanned(model, one_token, measured_experts=3)  # 2 of 4 experts, in 2 stacks of 2 layers
    said = "KL of single experts: of 3 of 16 measured, of 5 estimated, of 8 unknown: no product of theirs was met"
    assert said in [finding.text for finding in findings(report)]
    assert said in page(report)
    entries = report.as_dict()["sensitivity"]["experts"]
    assert [set(entry) for entry in entries] == [{"site", "expert", "tokens", "estimate", "leave_one_in"}] * 8
    assert [entry["leave_one_in"] is not None for entry in entries] == [True] * 3 + [False] * 5
    assert [entry["tokens"] for entry in entries] == [1] * 8
    cells = {row[:2]: row[3] for row in report.expert_rows(ALL)}
    assert sum(cell == "-" for cell in cells.values()) == 8
    assert sum(cell.startswith("~") for cell in cells.values()) == 5
    assert all(cell in page(report) for cell in cells.values())
    assert not scanned(model, one_token, parts=("precision",)).sensitivity
