"""Mixtures of experts as people have them, a folder on disk, through every verb: `sites`, `scan --advise`, `eval`, two
steps of `run` with all weights and with adapters on the experts, and the saved folders evaluated once more."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from safetensors import safe_open

from fp4rl.cli.main import main

COMMON = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"max_position_embeddings": 512, "bos_token_id": None}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
LOCAL = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {**GROUPED, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
LATENT |= {"qk_nope_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "full_attention_interval": 2,
}
FAMILIES = {
    "qwen3_moe": QWEN,
    "mixtral": LOCAL,
    "gpt_oss": {**LOCAL, "sliding_window": 64},
    "deepseek_v3": {**LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "llama4_text": {**LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
    "qwen3_next": {**QWEN, **DELTA, "linear_value_head_dim": 16, "shared_expert_intermediate_size": 64},
}
# What the two modes of an adapter are tried with.
LORA = {"w4a8": "adapter", "w4a4": "merged"}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SHORT = ["--count", "4", "--max-new-tokens", "8"]


def folder_of(family, path):
    """A folder as a trainer would save it: configuration, random weights, a tokenizer that fits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fp4rl.models.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    sizes = {**COMMON, **FAMILIES[family], "vocab_size": len(tokenizer)}
    sizes |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def suite(family, path, mode):
    lora = {"rank": 4, "alpha": 8.0}
    if family not in ("qwen3_moe", "mixtral"):  # there peft's all-linear takes the experts by itself
        lora["target_parameters"] = EXPERTS
    training = {
        "algorithm": "grpo",
        "steps": 2,
        "train_batch_size": 2,
        "mini_batch_size": 2,
        "rollout_n": 2,
        "lr": 0.01,
    }
    training |= {"max_response_length": 8, "entropy_coeff": 0.1, "filter_groups": {"enable": False}}
    base = {"model": {"path": str(path)}, "task": {"name": "arithmetic"}, "training": training}
    base |= {"injection": {"mode": mode, "deployment": "compressed_tensors"}}
    base |= {
        "evaluation": {
            "count": 4,
            "max_new_tokens": 8,
            "deployment": "compressed_tensors",
            "profiles": ["full", mode, "deployment"],
        }
    }
    adapted = {"model": {"path": str(path), "lora": lora}, "injection": {**base["injection"], "lora": LORA[mode]}}
    return {"suite": "mixture", "seeds": [0], "base": base, "arms": {"all": {}, "lora": adapted}}


def asked(capsys, *words):
    capsys.readouterr()
    code, said = main([str(word) for word in words]), capsys.readouterr()
    assert code == 0, said.err + said.out
    return said.out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match")  # peft's own, of its table for experts
@pytest.mark.parametrize("mode", ["w4a8", "w4a4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_experts_goes_through_every_verb_and_is_the_same_when_loaded_again(
    family, mode, in_process, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = folder_of(family, tmp_path / family)
    table = json.loads(asked(capsys, "sites", path, "--mode", mode, "--deployment", "compressed_tensors", "--json"))
    experts = {plan["site"] for plan in table["plans"] if plan["kind"] == "experts"}
    assert len(experts) == (2 if family == "deepseek_v3" else 4)
    asked(capsys, "scan", path, "format=mxfp4", "texts=4", "--advise", "advice.yaml")
    assert f" of {len(table['plans'])} sites" in (tmp_path / "advice.yaml").read_text()
    start = evaluated(capsys, path, mode)
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(suite(family, path, mode)))
    asked(capsys, "plan", "mixture.yaml", "arms.all=+advice.yaml")
    asked(capsys, "run", "mixture.yaml")
    for arm in ("all", "lora"):
        (run,) = (tmp_path / "runs" / "mixture").glob(f"{arm}-s0-*")
        evidence = [json.loads(line) for line in (run / "evidence.jsonl").read_text().splitlines()]
        assert next(line for line in evidence if line["kind"] == "live_equals_fresh")["max_difference"] == 0.0
        rounded = {(row["phase"], row["site"], row["point"]) for row in evidence if row.get("elements")}
        assert {(phase, site, point) for phase in ("rollout", "training", "evaluation") for site in experts
                for point in ("weight", "input")} <= rounded  # fmt: skip
        last = {e["profile"]["name"]: e for e in evidence if e["kind"] == "evaluation" and e.get("last")}
        spec = yaml.safe_load((run / "spec.yaml").read_text())
        (tmp_path / "deployed.yaml").write_text(yaml.safe_dump({**spec["injection"], "mode": None}))
        again = evaluated(capsys, run / "final", mode, "-p", "deployed=deployed.yaml")
        again["deployment"] = again.pop("deployed")
        for name in ("full", mode, "deployment"):
            same = ("answers_digest", "strict", "flexible", "mean_length", "n")
            assert {key: again[name][key] for key in same} == {key: last[name][key] for key in same}
            assert again[name]["answers_digest"] != start.get(name, start[mode])["answers_digest"]
        if arm == "lora":
            with safe_open(run / "final" / "adapter_model.safetensors", "pt") as saved:
                assert sum(".experts." in name for name in saved.keys()) == 2 * len(experts)  # noqa: SIM118


def evaluated(capsys, folder, mode, *more):
    words = ("eval", folder, "-p", "full", "-p", mode, *more, "--deployment", "compressed_tensors", *SHORT, "--json")
    return {e["profile"]["name"]: e for e in json.loads(asked(capsys, *words))}


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_same_answers(tmp_path, capsys):
    path = folder_of("qwen3_moe", tmp_path / "qwen3_moe")
    words = ["eval", str(path), "-p", "w4a4", "--deployment", "compressed_tensors", *SHORT, "--json"]
    done = subprocess.run([sys.executable, "-m", "fp4rl", *words], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(asked(capsys, *words))
