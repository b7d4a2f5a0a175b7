"""Old settings become an injection, and every trap that they held gets its line."""

import pytest

from fp4rl.spec.legacy import translate
from fp4rl.spec.mistakes import BadValue

OLD = "trainer.hw_error_injection."


def old(**settings):
    return translate(
        {f"{OLD}enabled": "True", f"{OLD}target_modules": '["linear"]'} | {OLD + k: v for k, v in settings.items()}
    )


def warned(translation, word):
    return any(word in line for line in translation.warnings)


@pytest.mark.parametrize(
    ("point", "points"),
    [("weight", {"weight"}), ("input", {"input"}), ("output", {"output"}), ("both", {"weight", "input"})],
)
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4", "fp8"])
def test_formats_keep_their_points(kind, point, points):
    injection = old(error_type=kind, injection_point=point).injection
    found = {p: getattr(injection, p) for p in ("weight", "input", "output")}
    assert {p for p, fmt in found.items() if fmt} == points
    assert {fmt.name for fmt in found.values() if fmt} == {kind}


@pytest.mark.parametrize(
    ("settings", "trap"),
    [
        ({"error_type": "mxfp4", "injection_point": "both"}, "depending on the version, inputs or outputs"),
        ({"error_type": "mxfp4", "injection_point": "weight"}, "lost after a forward without backward"),
        ({"error_type": "mxfp4", "injection_point": "output"}, "no kernel does"),
        ({"error_type": "fp8", "injection_point": "weight"}, "fp8 at the weight did nothing"),
        ({"error_type": "nvfp4"}, "no scale for the tensor"),
        ({"error_type": "mxfp4", "mxfp4_stochastic_rounding": "true"}, "half the value"),
        ({"error_type": "mxfp4", "mxfp4_block_2d": True}, "1,024 consecutive"),
        ({"error_type": "mxfp4", "use_ste": False}, "unrounded numbers"),
        ({"error_type": "mxfp4", "exclude_modules": ["layers.2"]}, "layers 20 to 29"),
        ({"error_type": "mxfp4", "exclude_modules": ["lora_A"]}, "ruins a model"),
        ({"error_type": "mxfp4", "exclude_modules": ["lm_head", "base_layer"]}, "left the real weights unrounded"),
        ({"error_type": "mxfp4"}, "on in validation"),
        ({"error_type": "mxfp4"}, "no run could be repeated"),
        ({"error_type": "deadzone"}, "residual stream"),
    ],
)
def test_each_trap_has_its_line(settings, trap):
    assert warned(old(**settings), trap)


def test_settings_without_a_trap_are_silent():
    quiet = old(error_type="mxfp4", injection_point="input", apply_during="training", seed=3)
    assert quiet.warnings == ()
    assert quiet.injection.seed == 3
    assert quiet.injection.apply_during.input == ("training",)


def test_words_of_exclude_modules_become_patterns_with_whole_numbers():
    targets = old(error_type="mxfp4", exclude_modules=["lm_head", "layers.2", "down_proj"]).injection.targets
    assert targets.why_left("model.layers.2.mlp.up_proj")
    assert targets.why_left("model.layers.20.mlp.down_proj")
    assert targets.why_left("model.layers.20.mlp.up_proj") is None


def test_a_dead_zone_keeps_its_threshold_as_a_share_of_the_largest():
    (error,) = old(error_type="deadzone", injection_point="output", target_layers="[15]").injection.errors
    assert (error.kind, error.scale, error.unit, error.targets.layers) == ("dead_zone", 0.01, "largest", (15,))


def test_gaussian_noise_on_a_weight_never_acted_and_is_refused():
    with pytest.raises(BadValue, match="never acted on a weight"):
        old(error_type="relative_gaussian", injection_point="weight")


def test_the_old_default_target_is_refused():
    with pytest.raises(BadValue, match="harmed norms"):
        translate({f"{OLD}enabled": True})


def test_switched_off_means_nothing():
    assert translate({f"{OLD}enabled": "False", f"{OLD}error_type": "mxfp4"}).injection.is_nothing
    assert translate({"VERL_NOISY_OPS_ENABLED": "0"}).injection.is_nothing


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({f"{OLD}eror_type": "mxfp4"}, "did you mean 'error_type'"),
        ({f"{OLD}error_type": "mxpf4"}, "did you mean 'mxfp4'"),
        ({f"{OLD}injection_point": "wieght"}, "did you mean 'weight'"),
        ({"VERL_NOISY_OPS_ENABLED": "1", "VERL_NOISY_OPS_SACLE": "1"}, "did you mean 'SCALE'"),
        ({"VERL_NOISY_OPS_ENABLED": "1", "VERL_NOISY_OPS_TYPE": "uniform"}, "is unknown"),
        ({"VERL_NOISY_OPS_ENABLED": "1", f"{OLD}enabled": "True"}, "harmed twice"),
        ({"PATH": "/bin"}, "no old setting here"),
    ],
)
def test_what_cannot_be_read_is_refused(settings, cure):
    with pytest.raises(BadValue, match=cure):
        translate(settings)


@pytest.mark.parametrize(
    ("more", "when"),
    [
        ({}, "both"),
        ({"FORWARD_ONLY": "1"}, "forward"),
        ({"BACKWARD_ONLY": "true"}, "backward"),
        ({"FORWARD_ONLY": "1", "BACKWARD_ONLY": "1"}, "both"),
    ],
)
def test_noisy_ops_keep_scale_type_and_direction(more, when):
    variables = {"ENABLED": "1", "SCALE": "5e-2", "TYPE": "absolute_gaussian"} | more
    translation = translate({f"VERL_NOISY_OPS_{key}": value for key, value in variables.items()} | {"HOME": "/x"})
    (error,) = translation.injection.errors
    assert (error.kind, error.when, error.scale) == ("absolute", when, 0.05)
    assert warned(translation, "on in validation")
    assert warned(translation, "never reached")


def test_noisy_ops_for_training_alone_stay_out_of_rollouts():
    translation = translate({"VERL_NOISY_OPS_ENABLED": "yes", "VERL_NOISY_OPS_TRAINING_ONLY": "1"})
    assert translation.injection.apply_during.errors == ("training",)
    assert warned(translation, "1e-4, not 5 %")
    assert not warned(translation, "on in validation")


def test_the_rollouts_own_copy_of_the_settings_is_read_too():
    keys = {"rollout.hw_error_injection_enabled": "true", "rollout.hw_error_injection_config.error_type": "mxfp4"}
    assert translate(keys).injection.input.name == "mxfp4"
