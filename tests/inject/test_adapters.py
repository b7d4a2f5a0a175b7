"""LoRA in its two deployments: Q(W) + BA with adapters in full precision, and Q(W + sBA) through the rounding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.inject.evidence import master_digest
from fp4rl.inject.resolve import resolve
from fp4rl.numerics.levels import smooth_slope, within_reach
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection
from fp4rl.spec.targets import Targets

ADAPTER = Injection.named("w4a16", dtype="float32")
MERGED = Injection.named("w4a16", dtype="float32", lora="merged")
IDS = torch.arange(1, 25).view(2, 12)


def base(dtype=torch.float32):
    torch.manual_seed(0)
    config = Qwen2Config(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=50,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def adapted(dtype=torch.float32, **settings):
    model = get_peft_model(base(dtype), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero after the start: a merged sum would be the base alone
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def lora_layer(model):
    return model.base_model.model.model.layers[1].mlp.up_proj


def trainable(model):
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def test_adapters_may_come_after_the_injection_too():
    model = base()
    with attach(model, ADAPTER):
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
        assert trainable(model) == trainable(adapted())


@pytest.mark.parametrize("injection", [ADAPTER, MERGED], ids=["adapter", "merged"])
def test_the_trainable_parameters_stay_what_they_were(injection):
    plain = trainable(adapted())
    assert sum(plain.values()) == 4 * (4 * 128 + 3 * 160) * 2
    model = adapted()
    with attach(model, injection):
        assert trainable(model) == plain
        model(IDS, labels=IDS).loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(plain)


@pytest.mark.parametrize("injection", [ADAPTER, MERGED], ids=["adapter", "merged"])
def test_14_bases_are_rounded_and_no_adapter(injection):
    table = resolve(adapted(), injection)
    assert len(table.plans) == 14
    assert {plan.site.kind for plan in table.plans} == {"linear"}
    reasons = {left.reason for left in table.left_out if left.site.kind == "adapter"}
    assert reasons == {"left by '*lora_*'"}


def test_plain_and_wrapped_names_both_work():
    for take in ("*.layers.1.mlp.*_proj", "*.layers.1.mlp.*.base_layer"):
        assert len(resolve(adapted(), Injection.named("w4a16", targets=Targets(take=(take,)))).plans) == 3


def test_an_adapter_taken_without_being_asked_for_is_refused():
    with pytest.raises(InvalidValueError, match=r"lora_A\.default is an adapter"):
        resolve(adapted(), Injection.named("w4a16", targets=Targets(leave_only=("*lm_head*",)), fused_groups="free"))


def test_an_adapter_that_was_asked_for_is_rounded():
    targets = Targets(take=("*lora_*",), opt_in=("adapter",))
    model = adapted()
    with attach(model, Injection.named("w4a16", targets=targets)) as harmed:
        model(IDS)
        harmed.require_calls()
        assert {row.site.rpartition(".lora_")[2] for row in harmed.evidence()} == {"A.default", "B.default"}


def test_adapter_computes_q_of_w_plus_ba():
    model = adapted()
    layer, x = lora_layer(model), torch.randn(5, 64)
    w, a, b = layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight
    with attach(model, ADAPTER):
        found = layer(x)
    assert torch.allclose(found, x @ fake_quantize(w, MXFP4).T + 3 * (x @ a.T @ b.T), atol=1e-5)
    assert not torch.allclose(found, x @ fake_quantize(w + 3 * b @ a, MXFP4).T, atol=1e-2)


@pytest.mark.parametrize("variant", ["identity", "clipped", "smooth"])
def test_merged_computes_q_of_the_sum_with_a_gradient_to_both_factors(variant):
    model = adapted(torch.float64)
    layer = lora_layer(model)
    w, a, b = (p.detach() for p in (layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight))
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 96, dtype=torch.float64)
    with attach(model, MERGED.model_copy(update={"straight_through": variant})):
        y = layer(x)
        y.backward(g)

    total = (w + 3 * b @ a).float()
    q = fake_quantize(total, MXFP4).double()
    through = g.T @ x.detach()
    if variant == "clipped":
        through = through * within_reach(total, MXFP4)
    if variant == "smooth":
        through = through * smooth_slope(total, MXFP4, 5.0, 3.0)
    for found, expected, with_base_alone in (
        (y, x @ q.T, x @ fake_quantize(w.float(), MXFP4).double().T),
        (x.grad, g @ q, g @ (w + 3 * b @ a)),
        (layer.lora_A.default.weight.grad, 3 * b.T @ through, None),
        (layer.lora_B.default.weight.grad, 3 * through @ a.T, None),
    ):
        found, size = found.detach(), expected.detach().norm()
        assert float((found - expected.detach()).norm() / size) < 1e-12
        if with_base_alone is not None:
            assert float((found - with_base_alone.detach()).norm() / size) > 1e-2
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("injection", [ADAPTER, MERGED], ids=["adapter", "merged"])
def test_live_logits_follow_every_step_of_the_adapters(injection):
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, fused=True)
    with attach(model, injection) as harmed:
        for _ in range(3):
            harmed.set_phase("training")
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            harmed.set_phase("rollout")
            with torch.no_grad():
                live, again = model(IDS).logits, model(IDS).logits
                fresh = adapted()
                fresh.load_state_dict(model.state_dict())
                with attach(fresh, injection):
                    assert torch.equal(live, fresh(IDS).logits)
                assert torch.equal(live, again)


def test_the_merged_sum_is_rounded_once_a_rollout():
    model = adapted()
    with attach(model, MERGED) as harmed, torch.no_grad():
        harmed.set_phase("rollout")
        for _ in range(3):
            model(IDS)
        rows = harmed.evidence()
    assert all(row.calls == 3 for row in rows)
    assert sum(row.elements for row in rows) == 2 * (4 * 64 * 64 + 3 * 64 * 96)


def test_a_step_of_an_adapter_that_nobody_announced_is_noticed_in_merged():
    model = adapted()
    layer, x = lora_layer(model), torch.randn(2, 64)
    with attach(model, MERGED), torch.no_grad():
        before = layer(x)
        layer.lora_B.default.weight.data.mul_(2)
        assert not torch.equal(layer(x), before)


def test_with_adapters_switched_off_the_rounded_base_is_left():
    model = adapted()
    layer, x = lora_layer(model), torch.randn(2, 64)
    base_alone = x @ fake_quantize(layer.base_layer.weight, MXFP4).T
    for injection in (ADAPTER, MERGED):
        with attach(model, injection), model.disable_adapter(), torch.no_grad():
            assert torch.allclose(layer(x), base_alone, atol=1e-5)


def test_outside_its_phases_merged_is_plain_lora():
    model = adapted()
    with torch.no_grad():
        plain = model(IDS).logits
        with attach(model, MERGED) as harmed:
            assert not torch.equal(model(IDS).logits, plain)
            harmed.set_phase("reference")
            assert torch.equal(model(IDS).logits, plain)
        assert torch.equal(model(IDS).logits, plain)


def test_the_base_is_rounded_once_in_every_phase_whatever_the_optimizer_does():
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    before = master_digest(model)
    with attach(model, ADAPTER) as harmed:
        for phase in ("rollout", "training", "rollout", "training"):
            harmed.set_phase(phase)
            for _ in range(2):
                model(IDS, labels=IDS).loss.backward()
                optimizer.step()
        assert sum(row.elements for row in harmed.evidence()) == 4 * 2 * (4 * 64 * 64 + 3 * 64 * 96)
    assert master_digest(model) != before


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"lora_dropout": 0.1}, "set lora_dropout=0"), ({"use_dora": True}, "use plain LoRA")],
)
def test_an_adapter_that_is_no_plain_sum_cannot_be_merged(settings, reason):
    with pytest.raises(InvalidValueError, match=reason):
        resolve(adapted(**settings), MERGED)


def test_an_adapter_with_dropout_is_computed_beside_the_rounded_weight_and_one_that_divides_by_its_norm_is_refused():
    assert resolve(adapted(lora_dropout=0.1), ADAPTER).plans
    with pytest.raises(InvalidValueError, match=r"q_proj: DoRA divides by the norm of the unrounded .*use_dora=False"):
        resolve(adapted(use_dora=True), ADAPTER)
    only_inputs = Injection(input="mxfp4", dtype="float32")
    assert resolve(adapted(use_dora=True), only_inputs).plans


def test_checkpointed_adapters_have_the_same_gradients():
    grads = []
    for checkpointed in (False, True):
        model = adapted().train()
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with attach(model, MERGED):
            model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_grad_weight_formats_reach_the_adapters_in_merged():
    model, plain = adapted(), {}
    for injection in (MERGED, MERGED.model_copy(update={"grad_weight": MXFP4})):
        model.zero_grad()
        with attach(model, injection):
            model(IDS, labels=IDS).loss.backward()
        plain[injection.grad_weight is None] = lora_layer(model).lora_A.default.weight.grad.clone()
    assert not torch.allclose(plain[True], plain[False], rtol=1e-2)


def test_merging_for_real_gives_the_numbers_of_merged():
    model = adapted()
    with torch.no_grad():
        with attach(model, MERGED):
            deployed = model(IDS).logits
        merged = model.merge_and_unload()
        assert isinstance(merged.model.layers[0].mlp.up_proj, nn.Linear)
        with attach(merged, ADAPTER):
            assert torch.allclose(merged(IDS).logits, deployed, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_another_scaling_of_an_adapter_is_another_weight_although_no_tensor_is_written(grad):
    model = adapted()
    with attach(model, MERGED), torch.set_grad_enabled(grad):
        model(IDS)
        lora_layer(model).set_scale("default", 3.0)
        live = model(IDS).logits
    with attach(model, MERGED), torch.no_grad():
        assert torch.equal(live, model(IDS).logits)


def test_adapters_that_are_switched_off_after_a_call_leave_the_base_alone():
    model = adapted()
    with attach(base(), Injection.named("w4a16", dtype="float32")) as plain, torch.no_grad():
        expected = plain.model(IDS).logits
    with attach(model, MERGED), torch.no_grad():
        merged = model(IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, merged)
