"""Old settings become an injection, and every trap that they held gets its line."""

import pytest
import yaml

from fp4rl.noise.schedule import multiplier_at
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.legacy import translate
from fp4rl.spec.load import load_spec
from fp4rl.spec.noise import EpochAware, Geometric, Multipliers

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
    with pytest.raises(InvalidValueError, match="never acted on a weight"):
        old(error_type="relative_gaussian", injection_point="weight")


def test_the_old_default_target_is_refused():
    with pytest.raises(InvalidValueError, match="norms"):
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
        ({"VERL_NOISY_OPS_ENABLED": "1", f"{OLD}enabled": "True"}, "twice"),
        ({"PATH": "/bin"}, "no setting of the verl fork"),
    ],
)
def test_what_cannot_be_read_is_refused(settings, cure):
    with pytest.raises(InvalidValueError, match=cure):
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


NOISE = "trainer.noise_injection."
FADE = {f"{NOISE}enabled": "True", f"{NOISE}sigma_start": "0.05", f"{NOISE}sigma_end": "0.0005"}


def noise(**settings):
    return translate(FADE | {NOISE + key.replace("__", "."): value for key, value in settings.items()}).noise


def test_a_geometric_fade_keeps_its_numbers_and_takes_no_injection_along():
    found = translate(FADE | {f"{NOISE}num_stages": "10", f"{NOISE}layer_types": '["rmsnorm"]'})
    assert found.noise.schedule == Geometric(sigma_start=0.05, sigma_end=0.0005, num_stages=10)
    assert found.noise.targets.kinds == ("norm",)
    assert set(found.fragment()) == {"noise"}
    assert warned(found, "never advanced the step")


def test_an_epoch_aware_fade_needs_the_trainers_epochs():
    with pytest.raises(InvalidValueError, match=r"name trainer\.total_epochs"):
        noise(epoch_aware="True")
    found = translate(FADE | {f"{NOISE}epoch_aware": "True", "trainer.total_epochs": "2"})
    assert found.noise.schedule == EpochAware(sigma_start=0.05, sigma_end=0.0005, epochs=2, stages_per_epoch=5)
    assert warned(found, "drew no noise at all")


def test_factors_of_layers_are_kept_whether_one_by_one_or_in_a_mapping():
    config = {"layer_sigma_config__enabled": "True", "layer_sigma_config__default_multiplier": "0.0"}
    for given in (
        {"layer_sigma_config__layer_multipliers": "{14: 1.0, 15: 1.5}"},
        {"layer_sigma_config__layer_multipliers__14": "1.0", "layer_sigma_config__layer_multipliers__15": "1.5"},
    ):
        found = noise(**config, **given).multipliers
        assert (dict(found.by_layer), found.others) == ({14: 1.0, 15: 1.5}, 0.0)
    assert noise(target_layers="[3, 4]").multipliers == Multipliers(by_layer=((3, 1.0), (4, 1.0)), others=0.0)
    off = noise(layer_sigma_config__enabled="False", layer_sigma_config__layer_multipliers="{14: 2.0}")
    assert off.multipliers == Multipliers()


def test_zones_become_the_layers_at_both_ends_with_a_factor_that_changes():
    """28 layers, of which 0-5 and 23-27 are the edge; the middle goes from 1 to 0.5 in the middle of the run."""
    zones = {
        "edge_layers": "[0, 1, 2, 3, 4, 5, 23, 24, 25, 26, 27]",
        "middle_layers": str([*range(6, 23)]),
        "phase_boundary_ratio": "0.5",
        "early_middle_mult": "1.0",
        "late_middle_mult": "0.5",
    }
    where = f"{NOISE}layer_sigma_config."
    settings = {f"{where}zone_schedule.{key}": value for key, value in zones.items()}
    found = translate(FADE | {f"{where}enabled": "True", f"{where}zone_schedule.enabled": "True"} | settings)
    factors = {
        share: [multiplier_at(found.noise.multipliers, layer, 28, share) for layer in range(28)] for share in (0.2, 0.7)
    }
    assert factors[0.2] == [1.0] * 28
    assert factors[0.7] == [1.0] * 6 + [0.5] * 16 + [1.0] * 6
    assert warned(found, "6 layers at the start and 5 at the end; here both ends have 6")


def test_one_norm_alone_is_kept_and_what_never_takes_noise_needs_no_pattern():
    found = noise(target_modules='["post_attention_layernorm"]', exclude_patterns='["lm_head", "input_layernorm"]')
    assert (found.targets.leave, found.targets.final_norm) == (("*input_layernorm*",), False)


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"sigma_strat": "1"}, "did you mean 'sigma_start'"),
        ({"layer_types": '["rmsnrom"]'}, "did you mean 'rmsnorm'"),
        ({"sigma_end": "0"}, "a geometric fade never reaches zero"),
        ({"target_modules": '["q_proj"]'}, "has no counterpart"),
        ({"sigma_trend": "[0.1, 0]"}, "was computed by the trainer"),
        ({"layer_sigma_config__layer_multiplers": "{1: 2}"}, "did you mean 'layer_multipliers'"),
        ({"layer_sigma_config__zone_schedule": "{edge_layers: [1], middle_layers: [0]}"}, "both ends"),
    ],
)
def test_old_noise_that_cannot_be_read_is_refused(settings, cure):
    with pytest.raises(InvalidValueError, match=cure):
        noise(**settings)


def test_a_start_that_is_not_named_is_not_guessed():
    with pytest.raises(InvalidValueError, match=r"sigma_start is not set"):
        translate({f"{NOISE}enabled": "True"})


def test_noise_that_was_off_is_none():
    found = translate(FADE | {f"{NOISE}enabled": "False"})
    assert found.fragment() == {"noise": "none"}


@pytest.mark.parametrize("epochs", [{}, {f"{NOISE}epoch_aware": "True", "trainer.total_epochs": "2"}])
@pytest.mark.parametrize(("kind", "point"), [("mxfp4", "both"), ("nvfp4", "weight"), ("deadzone", "output")])
def test_the_fragment_of_both_families_lies_over_a_spec_and_says_the_same(tmp_path, kind, point, epochs):
    """The kind: a default that the file leaves out and the reader fills in otherwise (an epoch-aware fade)."""
    harm = {"enabled": "True", "error_type": kind, "injection_point": point, "target_modules": '["linear"]'}
    settings = FADE | epochs | {OLD + key: value for key, value in harm.items()}
    found = translate(settings)
    spec, fragment = tmp_path / "spec.yaml", tmp_path / "old.yaml"
    spec.write_text("injection: w4a16\nnoise: {schedule: constant, multipliers: {by_layer: {0: 9.0}}}\n")
    fragment.write_text(yaml.safe_dump(found.fragment()))
    loaded = load_spec(spec, ["injection=none", "noise=none", f"+{fragment}"])
    assert (loaded.injection, loaded.noise) == (found.injection, found.noise)
    assert load_spec(spec, ["injection=none", f"+{fragment}"]).noise.multipliers == found.noise.multipliers


def test_the_rollouts_own_copy_of_the_settings_is_read_too():
    keys = {"rollout.hw_error_injection_enabled": "true", "rollout.hw_error_injection_config.error_type": "mxfp4"}
    assert translate(keys).injection.input.name == "mxfp4"
