"""Gradients of stacked experts, latents, adapters and erring products: sound ones pass, each planted wrong one fails.

The models are configurations of transformers with their own sizes; what is compared is a small module of their class.
"""

import pytest

from fp4rl.inject import adapted, experts, faults, linear, site
from fp4rl.inject.attention import AttentionState
from fp4rl.inject.linear import LinearState
from fp4rl.inject.site import SiteState
from fp4rl.lab.preflight import numbers

LORA = {"model": {"lora": {"rank": 4, "alpha": 12}}}
STACKS = LORA["model"]["lora"] | {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
W4A4 = {"mode": "w4a4"}
OF_EXPERTS = {"targets": {"take": ["*.experts.*"]}}
GRADIENTS = {"grad_input": "mxfp8", "grad_weight": "mxfp8"}


def config(family, name, **more):
    return {"architectures": [f"{name}ForCausalLM"], "model_type": family, "num_hidden_layers": 2, **more}


QWEN, MIXTRAL = config("qwen3_moe", "Qwen3Moe"), config("mixtral", "Mixtral")
GPT_OSS, LLAMA4 = config("gpt_oss", "GptOss"), config("llama4_text", "Llama4")
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2}
DEEPSEEK = config("deepseek_v3", "DeepseekV3", first_k_dense_replace=2)


def erring(**error):
    return {"errors": [error]}


def error_in_the_backward_too(monkeypatch):
    sound = SiteState.with_errors
    monkeypatch.setattr(
        SiteState, "with_errors", lambda self, x, where, drawn_for, **_: sound(self, x, where, drawn_for)
    )


def twice_its_size(monkeypatch):
    sound = faults.apply_error
    doubled = lambda x, e, generator: sound(x, e.model_copy(update={"scale": 2 * e.scale}), generator)  # noqa: E731
    monkeypatch.setattr(site, "apply_error", doubled)


def one_draw_for_both_gradients(monkeypatch):
    sound = SiteState._generator
    alike = lambda self, error, drawn_for, backward: sound(self, error, drawn_for, "g" if backward else "")  # noqa: E731
    monkeypatch.setattr(SiteState, "_generator", alike)


def nothing_wrong_with_the_weights_gradient(monkeypatch):
    sound = SiteState.with_errors
    monkeypatch.setattr(
        SiteState,
        "with_errors",
        lambda self, x, where, drawn_for, backward="": (
            x if backward == "grad_weight" else sound(self, x, where, drawn_for, backward=backward)
        ),
    )


def the_gradient_of_the_next_expert(monkeypatch):
    sound = linear.through
    monkeypatch.setattr(
        linear,
        "through",
        lambda master, *rest: sound(master.roll(1, 0) if master.ndim == 3 else master, *rest),
    )


def blocks_along_the_outputs(monkeypatch):
    monkeypatch.setattr(LinearState, "_as_stored", lambda self, weight: self._made(weight))


def inputs_of_experts_unrounded(monkeypatch):
    monkeypatch.setattr(experts.StackState, "rounded_input", lambda _, x: x)


def rounded_along_the_outputs(monkeypatch):
    monkeypatch.setattr(experts.StackState, "_rounded_by_rows", lambda self, _, g: self.gradient("grad_weight", g))


def another_draw_in_the_backward(monkeypatch):
    sound = experts.StackState.computed

    def twice(self, product):
        given = sound(self, product)
        self.rng.step += 1
        passed = sound(self, product)
        self.rng.step -= 1
        return passed + (given - passed).detach()

    monkeypatch.setattr(experts.StackState, "computed", twice)


def draws_for_all_experts_at_once(monkeypatch):
    """One draw for the stack, where each expert is described as a tensor of its own."""
    monkeypatch.setattr(experts.StackState, "rounded", SiteState.rounded)


def adapters_without_their_scaling(monkeypatch):
    """The sum is right; what reaches A and B is not multiplied by s."""
    sound = adapted.AdaptedSum._products

    def products(self):
        for product, scaling in zip(sound(self), self.scaling, strict=True):
            bare = product / scaling
            yield product.detach() + (bare - bare.detach())

    monkeypatch.setattr(adapted.AdaptedSum, "_products", products)


def merged_after_rounding(monkeypatch):
    """Q(W) + sBA where Q(W + sBA) is described."""
    monkeypatch.setattr(
        adapted, "rounded_sum", lambda state, sums: state.copy_of(sums.sources[0], sums.sources[0]) + sums.delta
    )


def rounded_behind_the_up_projection(monkeypatch):
    monkeypatch.setattr(AttentionState, "stored", lambda _, x: x)
    monkeypatch.setattr(AttentionState, "latent", property(lambda _: False))
    monkeypatch.setattr(AttentionState, "cached", lambda self, x: self.rounded_values(x, "kv_cache"))


def no_gradient_to_latents(monkeypatch):
    sound = AttentionState.stored
    monkeypatch.setattr(AttentionState, "stored", lambda self, x: sound(self, x.detach()))


# name -> (model, injection, plant, what the row then begins with)
CASES = {
    "an error of the forward": (
        None,
        W4A4 | erring(kind="relative"),
        error_in_the_backward_too,
        "grad_input of weight mxfp4, input mxfp4, relative@matmul/forward, identity: off by",
    ),
    "noise of unknown seed": (
        None,
        erring(kind="jitter", when="both"),
        twice_its_size,
        "result of jitter@matmul/both, identity: off by",
    ),
    "an error of both gradients": (
        None,
        erring(kind="absolute", when="backward"),
        one_draw_for_both_gradients,
        "draws of absolute@matmul/backward, identity: 1 draws repeat another one",
    ),
    "spikes in scores": (
        None,
        erring(kind="spikes", point="scores", share=0.1, when="both"),
        nothing_wrong_with_the_weights_gradient,
        "draws of spikes@scores/both, identity: 2 draws fewer than in the formulas, 0 more",
    ),
    "noise in values over a cache": (
        None,
        erring(kind="relative", point="values") | {"kv_cache": "mxfp4"},
        error_in_the_backward_too,
        "grad_query of kv_cache mxfp4, relative@values/forward, identity: off by",
    ),
    "stuck channels of weights": (
        None,
        erring(kind="stuck", point="weight", share=0.1, when="both"),
        twice_its_size,
        "result of stuck@weight/both, identity: off by",
    ),
    "a layer stored [in, out]": (
        GPT2,
        {"weight": {"name": "mxfp4", "rotation": 32}, "straight_through": "clipped"},
        blocks_along_the_outputs,
        "result of Conv1D, weight mxfp4, clipped: off by",
    ),
    "experts in one grouped product": (
        QWEN,
        W4A4,
        the_gradient_of_the_next_expert,
        "grad_gate_up_proj of Qwen3MoeExperts by grouped_mm, weight mxfp4, input mxfp4, identity: off by",
    ),
    "experts with rounded gradients": (
        MIXTRAL,
        W4A4 | GRADIENTS,
        rounded_along_the_outputs,
        "grad_gate_up_proj of MixtralExperts by grouped_mm, weight mxfp4, input mxfp4, grad_input mxfp8",
    ),
    "experts whose inputs are drawn": (
        QWEN,
        {"weight": "mxfp4_sr", "input": "mxfp4_sr"},
        another_draw_in_the_backward,
        "grad_gate_up_proj of Qwen3MoeExperts by grouped_mm, weight mxfp4_sr, input mxfp4_sr, identity: off by",
    ),
    "experts in bands whose weights and gradients are drawn": (
        LLAMA4,
        {"weight": "mxfp4_sr", "grad_input": "mxfp4_sr", "grad_weight": "mxfp4_sr"},
        draws_for_all_experts_at_once,
        "result of Llama4TextExperts, weight mxfp4_sr, grad_input mxfp4_sr, grad_weight mxfp4_sr, identity: off by nan",
    ),
    "experts that err": (
        QWEN,
        {"weight": "mxfp4"} | OF_EXPERTS | erring(kind="relative", when="both", **OF_EXPERTS),
        nothing_wrong_with_the_weights_gradient,
        "grad_gate_up_proj of Qwen3MoeExperts by grouped_mm, weight mxfp4, relative@matmul/both, identity: off by",
    ),
    "experts stored transposed, with biases": (
        GPT_OSS,
        W4A4,
        blocks_along_the_outputs,
        "result of GptOssExperts by grouped_mm, weight mxfp4, input mxfp4, identity: off by",
    ),
    "experts in bands": (
        LLAMA4,
        W4A4 | {"straight_through": "clipped"},
        inputs_of_experts_unrounded,
        "result of Llama4TextExperts, weight mxfp4, input mxfp4, clipped: off by",
    ),
    "a merged adapter": (
        LORA,
        W4A4 | {"lora": "merged"},
        adapters_without_their_scaling,
        "grad_a of lora merged, weight mxfp4, input mxfp4, identity: off by 0.67",
    ),
    "a merged adapter with rounded gradients": (
        LORA,
        W4A4 | GRADIENTS | {"lora": "merged"},
        merged_after_rounding,
        "result of lora merged, weight mxfp4, input mxfp4, grad_input mxfp8, grad_weight mxfp8, identity: off by",
    ),
    "merged adapters of experts": (
        QWEN | {"lora": STACKS},
        {"weight": "mxfp4", "lora": "merged"} | OF_EXPERTS,
        adapters_without_their_scaling,
        "grad_gate_up_proj_a of Qwen3MoeExperts by grouped_mm, weight mxfp4, identity: off by 0.67",
    ),
    "adapters beside experts stored transposed": (
        GPT_OSS | {"lora": STACKS},
        W4A4,
        adapters_without_their_scaling,
        "grad_gate_up_proj_a of GptOssExperts by grouped_mm, weight mxfp4, input mxfp4, identity: off by 0.67",
    ),
    "latents": (
        DEEPSEEK,
        {"kv_cache": "mxfp4", "straight_through": "clipped"},
        rounded_behind_the_up_projection,
        "result of DeepseekV3Attention, kv_cache mxfp4, clipped: off by",
    ),
    "latents with scores that err": (
        DEEPSEEK,
        {"kv_cache": "mxfp4"} | erring(kind="relative", point="scores"),
        no_gradient_to_latents,
        "grad_input of DeepseekV3Attention, kv_cache mxfp4, relative@scores/forward, identity: off by",
    ),
}


@pytest.mark.parametrize("which", CASES)
def test_a_wrong_gradient_of_a_kind_of_module_fails(which, subject, rows, folder, monkeypatch):
    model, injection, plant, measured = CASES[which]
    if model is not None and "model" not in model:
        lora = model.get("lora")
        model = folder({key: value for key, value in model.items() if key != "lora"})
        model["model"] |= {} if lora is None else {"lora": lora}
    own = subject(model, a={"injection": injection})
    (row,) = rows(numbers, "gradients", own)
    assert row.verdict == "pass", row.measured
    plant(monkeypatch)
    (row,) = rows(numbers, "gradients", own)
    assert row.verdict == "fail"
    assert row.measured.startswith(measured)


def test_a_class_without_a_formula_is_said_to_wait(subject, rows, folder):
    own = subject(folder(config("jetmoe", "JetMoe")), a={"injection": W4A4 | {"fused_groups": "free"}})
    first, *others = rows(numbers, "gradients", own)
    assert first.verdict == "pass"
    assert [(row.verdict, row.measured) for row in others] == [
        ("waits", "no formula of JetMoeParallelExperts is written here")
    ]
