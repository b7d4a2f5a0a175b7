"""Faults that the product must never have, each with the test that finds it: `make mutants` plants one at a time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`text`, which stands once in `file` below src/fp4rl, becomes `replacement`; every test in `tests` must fail."""

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]


_FRESH = "tests/inject/test_freshness.py::test_"
_PERTURB = "tests/noise/test_perturb.py::test_"

GUARDS_OF_A_ROUNDED_COPY = (
    Mutant(
        "another storage",
        "inject/cache.py",
        " or self._pointer != weight.data_ptr()",
        "",
        (f"{_FRESH}a_tensor_that_differs_outside_the_sample_shows_in_its_storage",),
    ),
    Mutant(
        "another version",
        "inject/cache.py",
        "self._version != weight._version or ",
        "",
        (f"{_FRESH}a_write_in_place_outside_the_sample_shows_in_the_version",),
    ),
    Mutant(
        "another sample",
        "inject/cache.py",
        "return self._read() == self._sample",
        "return True",
        (
            f"{_FRESH}the_sample_alone_catches_an_optimizer_that_nobody_announced[adamw-fused]",
            f"{_FRESH}every_way_of_writing_a_weight_is_noticed[through .data-False]",
        ),
    ),
    Mutant(
        "another scaling of the adapters",
        "inject/adapted.py",
        "if scaling != state.scaling:",
        "if False:",
        (
            "tests/inject/test_adapters.py::test_another_scaling_of_an_adapter_is_another_weight_although_no_tensor_is_written",
            "tests/inject/test_adapters.py::test_adapters_that_are_switched_off_after_a_call_leave_the_base_alone",
        ),
    ),
    Mutant(
        "an optimizer step",
        "inject/site.py",
        "register_optimizer_step_post_hook(_announce_step)",
        "",
        (f"{_FRESH}a_step_that_neither_version_nor_sample_shows_is_heard_of_by_a_model_and_its_copies",),
    ),
    Mutant(
        "an optimizer step after thawing",
        "inject/cache.py",
        "return self._held is None or not any(fingerprint.weight.requires_grad for fingerprint in self._held[2])",
        "return True",
        (
            f"{_FRESH}a_weight_that_is_no_longer_frozen_is_rounded_again_after_a_step",
            f"{_FRESH}a_step_that_neither_version_nor_sample_shows_is_heard_of_by_a_model_and_its_copies[itself]",
        ),
    ),
    Mutant(
        "a change of phase",
        "inject/attach.py",
        "            state.forget()\n            state.enter(phase, points, step)",
        "            state.enter(phase, points, step)",
        (f"{_FRESH}a_write_outside_the_sample_is_rounded_once_it_is_told[False-set_phase]",),
    ),
    Mutant(
        "invalidate()",
        "inject/attach.py",
        "        for state in self.states.values():\n            state.forget()\n\n    def remove",
        "        pass\n\n    def remove",
        (f"{_FRESH}a_write_outside_the_sample_is_rounded_once_it_is_told[True-invalidate]",),
    ),
    Mutant(
        "weights that hide their writes",
        "inject/cache.py",
        "return isinstance(weight, nn.Parameter) and weight.is_contiguous() and not weight.is_inference()",
        "return isinstance(weight, nn.Parameter)",
        (f"{_FRESH}what_cannot_be_watched_is_rounded_at_every_call[a weight of inference mode-True]",),
    ),
    Mutant(
        "sharded weights",
        "inject/linear.py",
        "if self.keep_copies and not torch.compiler.is_compiling():",
        "if not torch.compiler.is_compiling():",
        ("tests/inject/test_sharded.py::test_sharded_weights_are_rounded_whole_and_no_copy_of_them_is_kept",),
    ),
    Mutant(
        "a copy of inference mode",
        "inject/linear.py",
        "with torch.inference_mode(False), torch.no_grad():",
        "with torch.no_grad():",
        (f"{_FRESH}a_copy_made_in_inference_mode_can_be_trained_with",),
    ),
    Mutant(
        "a CUDA graph",
        "inject/cache.py",
        "if is_recording(weight.device):",
        "if False:",
        (f"{_FRESH}a_graph_cannot_record_a_rounded_copy",),
    ),
    Mutant(
        "an accelerator's sample",
        "inject/cache.py",
        "self._uses % ACCELERATOR_INTERVAL == 0 and _bits(self._read()) != _bits(self._sample)",
        "False",
        (f"{_FRESH}on_an_accelerator_the_sample_is_read_now_and_then_and_a_contradiction_stops_the_run",),
    ),
)

INJECTION = (
    Mutant(
        "clipped values keep their gradient",
        "inject/rounding.py",
        "return _passed(gradients[0], ctx.reach, ctx.rotation), None, None, None",
        "return gradients[0], None, None, None",
        (
            "tests/inject/test_gradients.py::test_linear_points_against_the_oracle[weight-model_dtype1-bfloat16-clipped]",
        ),
    ),
    Mutant(
        "looks that found nothing changed",
        "inject/evidence.py",
        "self.missed += would_change()",
        "pass",
        (
            "tests/inject/test_probe.py::"
            "test_a_phase_that_is_called_and_rounds_nothing_is_caught_by_its_looks_and_by_the_probe",
        ),
    ),
    Mutant(
        "operands held against their masters",
        "inject/probe.py",
        "return torch.equal(first, other) or torch.equal(first.nan_to_num(), other.nan_to_num())",
        "return True",
        (
            "tests/inject/test_probe.py::"
            "test_a_stale_copy_is_caught_after_the_first_update_while_every_counter_is_content",
        ),
    ),
    Mutant(
        "the bits of the masters",
        "inject/evidence.py",
        "total.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)",
        "pass",
        ("tests/inject/test_masters.py::test_the_digest_sees_one_flipped_bit_and_a_renamed_weight",),
    ),
)

_FALLBACK = "tests/numerics/test_fallback.py::test_"

NUMERICS = (
    Mutant(
        "the blocks that fall back",
        "numerics/fallback.py",
        "descending=True",
        "descending=False",
        (
            f"{_FALLBACK}values_are_those_of_the_definition[0.25-dtype0]",
            f"{_FALLBACK}values_in_the_deadzone_of_an_outlier_come_back",
        ),
    ),
    Mutant(
        "of equal blocks the first",
        "numerics/fallback.py",
        "largest.argsort(dim=-1, descending=True, stable=True)",
        "largest.flip(-1).argsort(dim=-1, descending=True, stable=True).neg().add(largest.shape[-1] - 1)",
        (f"{_FALLBACK}a_token_is_rounded_by_itself_and_of_equal_blocks_the_first_falls_back",),
    ),
    Mutant(
        "what the first rounding left",
        "numerics/fallback.py",
        "(widened(x) - widened(first))",
        "widened(x)",
        (f"{_FALLBACK}values_are_those_of_the_definition[1.0-dtype0]",),
    ),
    Mutant(
        "beyond the reach of both roundings",
        "numerics/levels.py",
        " | (chosen & within_reach(rest, once))",
        "",
        (f"{_FALLBACK}what_both_roundings_clip_is_beyond_reach_and_nothing_else",),
    ),
    Mutant(
        "the scale's exponent",
        "numerics/scales.py",
        "+ element.max_exponent)).clamp_(0, E8M0_LARGEST)",
        "+ element.max_exponent - 1)).clamp_(0, E8M0_LARGEST)",
        ("tests/numerics/test_reference.py::test_each_scale_rule_is_its_formula_in_exact_arithmetic",),
    ),
    Mutant(
        "a packer's epsilon",
        "numerics/steps.py",
        "rounded(rounded(amax / by) + epsilon)",
        "rounded(rounded(amax / by))",
        (
            "tests/numerics/test_steps.py::test_a_block_of_zeros_takes_the_scale_of_the_epsilon",
            "tests/numerics/test_against_msmodelslim.py::test_tensors_that_the_real_package_packed_are_reproduced[torch.float32-minmax]",
        ),
    ),
    Mutant(
        "the dtype in which a packer computes",
        "numerics/steps.py",
        'scale_math=str(dtype).removeprefix("torch.")',
        'scale_math="float32"',
        (
            "tests/numerics/test_against_msmodelslim.py::test_tensors_that_the_real_package_packed_are_reproduced[torch.bfloat16-minmax]",
        ),
    ),
    Mutant(
        "ties to even",
        "numerics/rounding.py",
        "return steps.round()",
        'return round_steps(steps, "half_away")',
        ("tests/numerics/test_backends.py::test_a_rounding_that_loses_its_ties_would_be_seen",),
    ),
    Mutant(
        "unbiased stochastic rounding",
        "numerics/rounding.py",
        "return whole + (fraction > uniform)",
        "return whole + (fraction > 0.5 * uniform)",
        (
            "tests/numerics/test_properties.py::test_stochastic_rounding_is_right_on_average_at_the_largest_values_too[reference-float32]",
        ),
    ),
)

NOISE = (
    Mutant(
        "the clean bits come back",
        "noise/perturb.py",
        "parameter.copy_(kept)",
        "pass",
        (
            f"{_PERTURB}clean_weights_are_bit_equal_after_fifty_rollouts",
            f"{_PERTURB}the_bits_come_back_after_an_exception",
        ),
    ),
    Mutant(
        "noise of the size that was asked",
        "noise/evidence.py",
        "if not abs(ratio - 1) <= _DEVIATIONS / math.sqrt(2 * elements) or ratio <= 0:",
        "if False:",
        (f"{_PERTURB}noise_of_another_size_than_asked_fails",),
    ),
    Mutant(
        "the silent first stage",
        "spec/noise.py",
        "if interval else 0.0",
        "if interval else self.sigma_start",
        ("tests/noise/test_schedule.py::test_three_stages_over_seven_steps_by_hand",),
    ),
)

TRAINING = (
    Mutant(
        "reward and accuracy are correlated across groups",
        "rl/fill.py",
        "(both - both.nanmean(-1, keepdim=True))",
        "(both - both.nanmean())",
        ("tests/rl/test_fill.py::test_how_reward_goes_with_accuracy_within_a_group",),
    ),
    Mutant(
        "the seed orders the prompts",
        "rl/fill.py",
        'Random(f"prompts/{self.seed}/{epoch}")',
        'Random(f"prompts/{epoch}")',
        ("tests/rl/test_stream.py::test_the_order_follows_the_seed",),
    ),
    Mutant(
        "positions without the padding",
        "models/positions.py",
        "(mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)",
        "mask.long().cumsum(-1).masked_fill(mask == 0, 0)",
        ("tests/rl/test_one_policy.py::test_what_is_scored_is_what_was_sampled",),
    ),
    Mutant(
        "k3 is never negative",
        "rl/losses.py",
        "return (x.exp() - x - 1).clamp(max=K3_CAP)",
        "return (x.exp() + x - 1).clamp(max=K3_CAP)",
        ("tests/rl/test_losses.py::test_k3_has_its_hand_worked_values_and_averages_to_the_exact_kl",),
    ),
)

_PACKED = "tests/models/packed/test_"

PACKED_FOLDERS = (
    Mutant(
        "ModelOpt's factor is multiplied before the code",
        "models/packed/weight.py",
        "stored.scales.float() * factor",
        "stored.scales.float() / (1 / factor)",
        (f"{_PACKED}other_layouts.py::test_a_folder_of_modelopt_is_multiplied_out_in_its_own_order",),
    ),
    Mutant(
        "compressed-tensors decodes in BF16",
        "models/packed/compressed_tensors.py",
        "decoded_in=torch.bfloat16",
        "decoded_in=None",
        (f"{_PACKED}compressed_tensors.py::test_a_folder_says_what_it_holds_and_its_values_are_the_librarys[NVFP4]",),
    ),
    Mutant(
        "gpt-oss's experts are stored [out, in]",
        "models/packed/weight.py",
        "whole.transpose(-1, -2).contiguous() if self.transposed",
        "whole.view(self.shape) if self.transposed",
        (f"{_PACKED}other_layouts.py::test_the_experts_of_gpt_oss",),
    ),
    Mutant(
        "columns of a dual scale",
        "models/packed/ascend_v1.py",
        "return int(columns)",
        "return 512",
        (f"{_PACKED}other_layouts.py::test_a_folder_of_msmodelslim_with_every_type_of_layer",),
    ),
    Mutant(
        "a tensor without a place in the model",
        "models/packed/into_model.py",
        'sorted(report["unexpected_keys"])',
        "[]",
        (f"{_PACKED}into_model.py::test_a_tensor_that_the_model_has_no_place_for_is_named",),
    ),
    Mutant(
        "layers that are not packed keep their inputs",
        "models/packed/as_served.py",
        "if {site for site, _ in _taken(model)} != set(sites):",
        "if False:",
        (f"{_PACKED}as_served.py::test_layers_left_in_full_precision_keep_their_inputs",),
    ),
    Mutant(
        "the kernel of a layout",
        "models/packed/as_served.py",
        'return "compressed_tensors" if',
        "return None if",
        (
            f"{_PACKED}as_served.py::"
            "test_logits_are_those_of_the_injection_whose_weights_were_packed[MXFP4-w4a4-bfloat16]",
        ),
    ),
)

COMPARISON = (
    Mutant(
        "a seed counts once",
        "lab/compare/fairness.py",
        "            if count > 1:",
        "            if count > 9:",
        ("tests/lab/test_compare.py::test_a_seed_counts_once_a_side",),
    ),
    Mutant(
        "results of one code",
        "lab/compare/fairness.py",
        'yield from _unequal("code", "the code that computed the results (rerun the stale side)", sides)',
        "del sides",
        ("tests/lab/test_compare.py::test_results_of_other_code_are_refused",),
    ),
    Mutant(
        "a call is no rounding",
        "lab/gaps.py",
        "else row.missed > 0",
        "else False",
        (
            "tests/lab/test_gaps.py::test_a_phase_or_a_site_that_was_called_and_not_rounded_is_a_gap[rollout-False]",
            "tests/lab/test_gaps.py::test_a_single_look_that_missed_is_a_gap_though_others_saw_a_change",
        ),
    ),
    Mutant(
        "the last evaluation is part of the evidence",
        "lab/gaps.py",
        "*(_missing_evaluations(spec, evaluations) if evaluations is not None else ()),",
        "",
        ("tests/lab/report/test_one_answer.py::test_the_run_whose_last_full_evaluation_was_deleted",),
    ),
    Mutant(
        "the correction for several questions",
        "lab/statistics/seeds.py",
        "p_values[key] * comparisons",
        "p_values[key]",
        ("tests/lab/test_statistics.py::test_holm_reproduces_the_textbook_order",),
    ),
)

_EXPORTED = "tests/engines/checkpoints/test_compressed_tensors.py::test_"
EXPORT = (
    Mutant(
        "one divisor for a fused matrix",
        "engines/checkpoints/policy.py",
        "for other in (entry, *entry.beside))",
        "for other in (entry,))",
        (f"{_EXPORTED}layers_that_vllm_fuses_share_the_divisor_of_their_common_largest_magnitude",),
    ),
    Mutant(
        "layers of a mixture stand there by name",
        "engines/checkpoints/layouts/compressed_tensors.py",
        "if len(schemes) == 1:",
        "if schemes:",
        (f"{_EXPORTED}vllm_finds_one_scheme_for_every_fused_layer",),
    ),
    Mutant(
        "what is left stands under ignore",
        "engines/checkpoints/layouts/compressed_tensors.py",
        "if entry.weight is None and name not in embeddings:",
        "if False:",
        (
            f"{_EXPORTED}vllm_finds_experts_and_leaves_their_routers[qwen3_moe-mlp]",
            f"{_EXPORTED}the_configuration_is_the_one_that_the_library_writes[mixed]",
        ),
    ),
    Mutant(
        "the dtype that engines decode to",
        "engines/checkpoints/layouts/compressed_tensors.py",
        'dict.fromkeys(named, "bfloat16")',
        "{}",
        (f"{_EXPORTED}transformers_loads_the_rounded_weights_and_gives_the_same_logits[w4a16-torch.float32]",),
    ),
)

MUTANTS = (
    *GUARDS_OF_A_ROUNDED_COPY,
    *INJECTION,
    *NUMERICS,
    *NOISE,
    *TRAINING,
    *PACKED_FOLDERS,
    *EXPORT,
    *COMPARISON,
)
