"""Checks that need a configuration alone: each with the very defect planted, and a clean case beside it."""

import time
from dataclasses import replace

from fp4rl.lab.preflight import data, live, model, numbers, surroundings
from fp4rl.lab.preflight.preflight import EVERY, checks
from fp4rl.numerics import selftest

W4A4 = {"injection": {"mode": "w4a4", "deployment": "compressed_tensors"}}
# Qwen2.5-1.5B's own sizes, from its config.json.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 160,
}


def told(rows):
    return [(row.verdict, row.measured) for row in rows]


def test_a_real_shape_without_weights_is_looked_at_in_seconds(folder, subject):
    """7 linear layers in each of 28 are rounded; embedding, norms and attention are left; prompts have no tokenizer."""
    began = time.perf_counter()
    own = subject(folder(QWEN), a=W4A4)
    by_name = {row.check: row for check in model.CHECKS for row in check.rows(own)}
    assert time.perf_counter() - began < 10
    assert by_name["sites"].verdict == "pass"
    assert by_name["sites"].measured.startswith("196 sites, 7 in each of 28 layers")
    assert by_name["fused"].measured.startswith("56 groups of fused layers")
    assert by_name["widths"].measured == "in_features 1536, 8960"
    assert by_name["fits"].verdict == "waits"
    assert "no tokenizer" in by_name["fits"].measured


def test_a_linear_layer_that_is_neither_rounded_nor_left_fails(subject, rows, monkeypatch):
    own = subject(a=W4A4)
    assert told(rows(model, "sites", own)) == [("pass", "14 sites, 7 in each of 2 layers; 9 left")]
    whole = model.resolve
    monkeypatch.setattr(model, "resolve", lambda *which: replace(table := whole(*which), plans=table.plans[1:]))
    (row,) = rows(model, "sites", own)
    assert row.verdict == "fail"
    assert row.measured == "1 linear layer neither rounded nor left, such as model.layers.0.self_attn.q_proj"


def test_a_head_among_the_rounded_fails(subject, rows, monkeypatch):
    whole = model.resolve

    def taken(modules, injection):
        table = whole(modules, injection)
        head = next(left.site for left in table.left_out if left.site.role == "lm_head")
        return replace(table, plans=(*table.plans, replace(table.plans[0], site=head)))

    monkeypatch.setattr(model, "resolve", taken)
    (row,) = rows(model, "sites", subject(a=W4A4))
    assert (row.verdict, row.measured) == ("fail", "1 site rounded that nobody asked for, such as lm_head")


def test_a_weight_that_is_rounded_twice_fails(subject, rows, monkeypatch):
    whole = model.resolve
    monkeypatch.setattr(
        model, "resolve", lambda *which: replace(table := whole(*which), plans=(*table.plans, table.plans[0]))
    )
    (row,) = rows(model, "sites", subject(a=W4A4))
    assert (row.verdict, row.measured) == ("fail", "1 weight rounded more than once")


def test_a_group_with_two_formats_fails(subject, rows):
    """Where groups must agree, `resolve` refuses; where they need not, a row says which do not."""
    mixed = {"injection": {"weight": "mxfp4", "by_pattern": {"*.q_proj": "mxfp8"}}}
    (row,) = rows(model, "fused", subject(a=mixed))
    assert row.verdict == "fail"
    assert "a serving kernel fuses these" in row.measured
    free = {"injection": mixed["injection"] | {"fused_groups": "free"}}
    (row,) = rows(model, "fused", subject(a=free))
    assert (row.verdict, row.measured) == ("warn", "2 groups with several, such as model.layers.0.self_attn.qkv")
    assert told(rows(model, "fused", subject(a=W4A4)))[0][0] == "pass"


def test_fused_weights_with_an_nvfp4_factor_each_are_warned_of(subject, rows):
    """q, k and v agree in their format, and had a factor each; a mode gives them one."""
    (row,) = rows(model, "fused", subject(a={"injection": {"weight": "nvfp4"}}))
    assert (row.verdict, row.measured) == (
        "warn",
        "each weight has a factor of its own in 4 groups, such as model.layers.0.self_attn.qkv",
    )
    assert told(rows(model, "fused", subject(a={"injection": "nvfp4_w4a16"})))[0][0] == "pass"


def test_a_router_among_the_rounded_fails(folder, subject, rows, monkeypatch):
    own = subject(folder(MIXTURE), a=W4A4)
    assert told(rows(model, "experts", own)) == [("pass", "4 stacks of experts, 0 routers rounded")]
    whole = model.resolve

    def taken(modules, injection):
        table = whole(modules, injection)
        router = next(left.site for left in table.left_out if left.site.kind == "router")
        return replace(table, plans=(*table.plans, replace(table.plans[0], site=router)))

    monkeypatch.setattr(model, "resolve", taken)
    assert [row.verdict for row in rows(model, "experts", own)] == ["fail"]


def test_a_width_without_a_kernel_is_warned_of(subject, rows):
    """W4A8 on Ascend needs in_features that 64 divides; 96 is not such a width."""
    ascend = {"injection": {"mode": "w4a8", "deployment": "vllm_ascend"}}
    narrow = {"model": {"embedded": {"hidden_size": 96, "intermediate_size": 128, "warm_up_steps": 0}}}
    (row,) = rows(model, "widths", subject(narrow, a=ascend))
    assert row.verdict == "warn"
    assert "12 dense layers" in row.measured
    assert told(rows(model, "widths", subject(a=ascend))) == [("pass", "in_features 64, 192")]


def test_noise_that_would_reach_a_router_fails(folder, subject, rows, monkeypatch):
    noisy = {"noise": {"targets": {"kinds": ["linear"]}}}
    own = subject(folder(MIXTURE), a=noisy)
    assert [row.verdict for row in rows(model, "noisy", own)] == ["pass"]
    taken = model.noisy_weights

    def with_a_router(modules, noise, **rest):
        weights = taken(modules, noise, **rest)
        return (*weights, replace(weights[0], name="model.layers.0.mlp.gate.weight"))

    monkeypatch.setattr(model, "noisy_weights", with_a_router)
    (row,) = rows(model, "noisy", own)
    assert row.verdict == "fail"
    assert "model.layers.0.mlp.gate.weight among them" in row.measured


def test_a_held_out_problem_that_is_trained_on_fails(subject, rows, monkeypatch):
    own = subject(a={"evaluation": {"count": 8}})
    assert told(rows(data, "problems", own))[0] == ("pass", "64 learned, 8 judged, 0 shared")
    runner = data.evaluation_runner(own.arms["a"])
    learned = replace(runner, problems=own.arms["a"].task.problems("train", 8))
    monkeypatch.setattr(data, "evaluation_runner", lambda _: learned)
    row = rows(data, "problems", own)[0]
    assert row.verdict == "fail"
    assert row.measured.startswith("64 learned, 8 judged, 8 shared")


def test_an_epoch_that_dynamic_sampling_cuts_short_is_warned_of(subject, rows):
    """By hand: two epochs of silence and five values in 12 steps, of which the last is the first of the next epoch.

    The data last six steps. With two batches a step the first epoch ends after its second value, with three after its
    first: two and three values never come.
    """
    noise = {"schedule": {"kind": "epoch_aware", "epochs": 2}}
    recipe = {"steps": 12, "train_batch_size": 4, "mini_batch_size": 4}
    often = recipe | {"filter_groups": {"enable": True, "max_num_gen_batches": 3}}
    data_of_six = {"task": {"name": "arithmetic", "train_count": 24}}
    (row,) = rows(data, "draws", subject(data_of_six, a={"training": often, "noise": noise}))
    assert row.verdict == "warn"
    assert row.measured.endswith("of 24 problems by batches drawn: 0 at 1 a step, 2 at 2 a step, 3 at 3 a step")
    once = recipe | {"filter_groups": {"enable": False}}
    assert told(rows(data, "draws", subject(data_of_six, a={"training": once, "noise": noise})))[0][0] == "pass"
    plain = {"noise": {"schedule": {"num_stages": 3}}, "training": often}
    (row,) = rows(data, "draws", subject(data_of_six, a=plain))
    assert (row.verdict, row.measured) == ("pass", "geometric follows the steps that are done, not the data")


def test_what_a_run_is_refused_for_is_a_row(subject, rows):
    assert [row.verdict for row in rows(model, "fits", subject())] == ["pass"]
    (row,) = rows(model, "fits", subject(a={}, b={"training": {"max_prompt_length": 2}}))[1:]
    assert (row.verdict, row.arms) == ("fail", ("b",))


def test_a_quantizer_without_its_factor_fails(subject, rows, monkeypatch):
    assert [row.verdict for row in rows(numbers, "quantizer", subject())] == ["pass"]
    whole = selftest.self_test
    monkeypatch.setattr(selftest, "self_test", lambda: whole(lambda x, fmt, generator: x.clamp(-6, 6).round()))
    (row,) = rows(numbers, "quantizer", subject())
    assert row.verdict == "fail"
    assert row.measured.startswith("known vectors, mxfp4")


def test_an_unrounded_arm_from_a_folder_that_an_engine_rounds_is_warned_of(subject, rows, tmp_path):
    """A folder that llm-compressor's library packed: an engine reads its configuration, and serves every arm by it."""
    from packed_models import LINEAR, by_compressed_tensors, start

    plain, tokenizer = start()
    for part in (plain, tokenizer):
        part.save_pretrained(tmp_path / "plain")
    packed = by_compressed_tensors(tmp_path / "packed", ("MXFP4", LINEAR))
    (row,) = rows(model, "start", subject({"model": {"path": str(tmp_path / "plain")}}, a={}, b=W4A4))
    assert row.verdict == "pass"
    bare, rounded = rows(model, "start", own := subject({"model": {"path": str(packed)}}, a={}, b=W4A4))
    assert (bare.verdict, bare.arms, rounded.arms) == ("warn", ("a",), ("b",))
    assert "is packed (compressed-tensors" in bare.measured
    assert "rounds this arm, which rounds nothing" in bare.measured
    assert live.without_weights(own.arms["a"]) is None  # packed weights are read like others
    for file in packed.glob("*.safetensors"):
        file.unlink()
    (row, _) = rows(model, "start", own)
    assert "is packed (compressed-tensors)" in row.measured


def test_a_folder_that_is_missing_is_named_once(subject, rows):
    """By the check of files; what needs its modules has no row, and what needs its tokenizer waits."""
    own = subject({"model": {"path": "/nowhere"}}, a={"injection": {"mode": "w4a16"}})
    told = {check.name: [row.verdict for row in check.rows(own)] for check in (*surroundings.CHECKS, *model.CHECKS)}
    assert [name for name, verdicts in told.items() if "fail" in verdicts] == ["files"]
    assert told["fits"] == ["waits"]
    assert told["sites"] == told["start"] == []


def test_a_folder_that_is_missing_fails_once_and_all_else_waits_for_it(subject, rows):
    own = subject({"model": {"path": "nowhere"}}, a={"injection": {"mode": "w4a4"}})
    (row,) = rows(numbers, "gradients", own)
    assert (row.verdict, row.measured) == ("waits", "model folder 'nowhere' does not exist")
    every = [row for needs in EVERY for check in checks(needs) for row in check.rows(own)]
    assert {row.check for row in every if row.verdict == "fail"} == {"files"}
    assert {row.check for row in every if row.verdict == "waits"} >= {"gradients", "fits", "rounded", "agenda", "steps"}
