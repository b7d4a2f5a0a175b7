"""Sampler and trainer are one policy, for the families people use and whatever is rounded: as they really run.

Each case goes through the trainer's own generation and scoring, on prompts of unequal length (padded on the left), with
a tiny random model of its family whose logits are far from flat. In float32 a value may lie on a rounding tie: there
the order of a sum decides, and a whole 4-bit step follows. Such answers are counted; in float64 there are none.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.inject.resolve import resolve
from fp4rl.models.load import load
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.evaluate import answer
from fp4rl.rl.events import ignore
from fp4rl.rl.mismatch import mismatch_metrics
from fp4rl.rl.run import Run
from fp4rl.rl.session import ResumeState, TrainingSession
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.evaluation import Evaluation
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,  # far from the flat logits of the usual 0.02
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT_NEO = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "initializer_range": 0.15}
FAMILIES = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "qwen3_moe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gemma": SIZES,
    "phi3": {**SIZES, "head_dim": None},
    "gpt_neox": {**SIZES, "head_dim": None},
    "gpt_oss": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    # learned positions
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.15, **NO_DROPOUT},
    "gpt_neo": {**GPT_NEO, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128},
    "opt": {**SIZES, "head_dim": None, "word_embed_proj_dim": 64, "ffn_dim": 96, "init_std": 0.15, "dropout": 0.0},
}
ROUNDED = {
    "nothing": None,
    **{
        mode: {"mode": mode}
        for mode in ("w4a16", "w4a8", "w4a4", "w16a4", "w8a8", "nvfp4_w4a16", "nvfp4_w4a4", "w4a4_out")
    },
    "rotated": {"weight": {"name": "mxfp4", "rotation": 32}, "input": {"name": "mxfp4", "rotation": 32}},
    "dual": {"weight": "mxfp4_dual", "input": "mxfp4_dual"},
    "cache8": {"mode": "w4a4", "kv_cache": "mxfp8"},
    "cache4": {"mode": "w4a8", "kv_cache": "mxfp4"},
    "gradients": {"mode": "w4a4", "grad_input": "mxfp8", "grad_weight": "mxfp8"},
}
QUICK = {("llama", "w4a4"), ("llama", "cache8"), ("gpt_neo", "nothing"), ("qwen3_moe", "w4a16")}
CASES = [
    pytest.param(family, rounded, marks=[] if (family, rounded) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for rounded in ROUNDED
]

# What is refused by name, and why: none of it is silently left out.
REFUSED = {("gpt_oss", "w4a4_out"): "adds a bias after its matmul"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(family, dtype)` -> a saved tiny random model with the embedded tokenizer."""
    made = {}

    def of(family, dtype):
        if (family, dtype) not in made:
            tokenizer = build_tokenizer()
            sizes = {key: value for key, value in FAMILIES[family].items() if value is not None}
            ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes, **ends)
            )
            for weight in model.parameters():
                if weight.ndim == 1:  # biases of 0 and norms of 1 would hide what they do
                    weight.data.add_(0.05 * torch.randn_like(weight))
            made[family, dtype] = tmp_path_factory.mktemp(family)
            model.to(getattr(torch, dtype)).save_pretrained(made[family, dtype])
            tokenizer.save_pretrained(made[family, dtype])
        return made[family, dtype]

    return of


def attempt_at(path, dtype, injection, into, **training):
    """The trainer of a run on the model in `path`, as `fp4rl run` builds it."""
    torch.set_num_threads(1)
    described = Experiment.model_validate(
        {
            "model": {"path": str(path), "dtype": dtype},
            "task": {"name": "arithmetic", "difficulty": 3, "train_count": 64},
            "injection": injection,
            "evaluation": {"count": 24, "max_new_tokens": 16},
            "training": {
                "train_batch_size": 8,
                "mini_batch_size": 8,
                "rollout_n": 4,
                "max_response_length": 24,
                "overlong_buffer": {"enable": False},
                "filter_groups": {"enable": False},
                **training,
            },
        }
    )
    return TrainingSession(Run(described, into, path, ignore), ResumeState())


def generated(trainer):
    rows = trainer.parts.recipe.train_batch_size * trainer.parts.recipe.rollout_n
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": ""}] * rows)
    prompts = batch["prompt_mask"].sum(-1)
    assert prompts.min() < prompts.max(), "no prompt is padded: nothing would be shown"
    return batch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "rounded"), CASES)
def test_what_is_scored_is_what_was_sampled(family, rounded, dtype, folder, tmp_path):
    """Kind: decoding and the scoring forward read the same tokens as two policies."""
    path, injection = folder(family, dtype), ROUNDED[rounded]
    if (family, rounded) in REFUSED:
        with pytest.raises(InvalidValueError, match=REFUSED[family, rounded]):
            resolve(load(path, dtype)[0], Injection.model_validate(injection))
        return
    trainer = attempt_at(path, dtype, injection, tmp_path).trainer
    batch = generated(trainer)
    if dtype == "bfloat16":
        assert trainer._step_metrics["rollout_corr/decode_k3_kl"] < 2e-3
        return
    scored = trainer._old(batch)
    mask, sampled = batch["completion_mask"], batch["sampling_per_token_logps"]
    tied = ((scored - sampled).abs() * mask).amax(-1) > 1e-4
    assert tied.sum() <= 2
    apart = mismatch_metrics(scored[~tied], sampled[~tied], mask[~tied])
    assert apart["rollout_corr/k3_kl"] < 1e-6
    if family == "gpt_neo":
        return  # its attention computes in float32 whatever the dtype
    trainer.model.double()
    trainer.model.set_experts_implementation("eager")  # grouped_mm knows no float64
    trainer.parts.phases.weights_changed()
    generated(trainer)
    assert trainer._step_metrics["rollout_corr/decode_k3_kl"] < 1e-9


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_the_micro_batch_changes_nothing_but_float_noise(family, folder, tmp_path):
    injection = {"mode": "w4a4"} if family == "llama" else {"mode": "w4a16"}
    trainer = attempt_at(folder(family, "float32"), "float32", injection, tmp_path).trainer
    batch, scored = generated(trainer), []
    for size in (32, 8, 1):
        trainer.args.per_device_train_batch_size = size
        with torch.no_grad():
            scored.append(trainer._score(trainer.model, batch)[0][batch["completion_mask"].bool()])
    for other in scored[1:]:
        torch.testing.assert_close(other, scored[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rounded", ["w4a4", "cache8"])
def test_the_size_of_an_evaluation_batch_changes_no_answer(rounded, folder, tmp_path):
    run = attempt_at(folder("llama", "bfloat16"), "bfloat16", ROUNDED[rounded], tmp_path)
    run.phases.attachment.set_phase("evaluation")
    task, problems = run.run.experiment.task, run.run.runner.problems
    spec = lambda size: Evaluation(max_new_tokens=16, batch_size=size)  # noqa: E731
    answers = [
        [item.completion for item in answer(run.model, run.tokenizer, problems, task.score, spec(size))]
        for size in (60, 7, 1)
    ]
    assert len(set(answers[0])) > 1
    assert answers[0] == answers[1] == answers[2]
