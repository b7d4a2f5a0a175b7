"""Multimodal folders on disk through every verb: the text model is scored, scanned, trained and rounded on text; what
sees stays as it was and where it was, and the saved folder opens like the one that the run started from."""

import json
import re

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tiny_models import MULTIMODAL, MULTIMODAL_MIXTURES, multimodal
from transformers import AutoModelForImageTextToText

from fp4rl.cli.main import main
from fp4rl.models.tokenizer import build_tokenizer

# What a mode is tried with: adapters apart or merged; a KL to the start, or to a teacher over the whole vocabulary.
LORA = {"w4a8": "adapter", "w4a4": "merged"}
OBJECTIVE = {"w4a8": {"distillation": {"coef": 0.5}}, "w4a4": {"entropy_coeff": 0.1}}
# The names on disk of what sees: vision_tower, multi_modal_projector, visual.
SEEING = re.compile("vis|multi_modal")
SHORT = ["--count", "4", "--max-new-tokens", "8"]
SITES = dict.fromkeys(MULTIMODAL, 7) | {"Qwen3VLMoe": 6, "Llama4": 9}  # of a layer
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# As the hub has them: the two files of a processor, byte for byte what the start's folder says.
PROCESSOR = {"preprocessor_config.json": '{"image_mean": [0.5, 0.5, 0.5],  "do_resize": true}\n'}
PROCESSOR |= {"chat_template.json": '{"chat_template": "{{ messages }}"}'}


def folder_of(family, path):
    """A folder as people have it: configuration, random weights, a tokenizer that fits, and the processor's files."""
    tokenizer = build_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    multimodal(family, num_hidden_layers=2, max_position_embeddings=512, **ends).save_pretrained(path)
    tokenizer.save_pretrained(path)
    for name, content in PROCESSOR.items():
        (path / name).write_text(content)
    return path


def suite(path, mode, family):
    training = {"algorithm": "grpo", "steps": 2, "train_batch_size": 2, "mini_batch_size": 2, "rollout_n": 2}
    training |= {"lr": 0.01, "max_response_length": 8, "filter_groups": {"enable": False}, **OBJECTIVE[mode]}
    profiles = {
        "count": 4,
        "max_new_tokens": 8,
        "deployment": "compressed_tensors",
        "profiles": ["full", mode, "deployment"],
    }
    injection = {"mode": mode, "deployment": "compressed_tensors"}
    base = {"model": {"path": str(path)}, "task": {"name": "arithmetic"}, "training": training}
    base |= {"injection": injection, "evaluation": profiles}
    adapters = {"rank": 4} | ({"target_parameters": EXPERTS} if family in MULTIMODAL_MIXTURES else {})
    lora = {"model": {"path": str(path), "lora": adapters}, "injection": {**injection, "lora": LORA[mode]}}
    return {"suite": "seeing", "seeds": [0], "base": base, "arms": {"all": {}, "lora": lora}}


def asked(capsys, *words):
    capsys.readouterr()
    code, said = main([str(word) for word in words]), capsys.readouterr()
    assert code == 0, said.err + said.out
    return said.out


def evaluated(capsys, folder, mode, *more):
    words = ("eval", folder, "-p", "full", "-p", mode, *more, "--deployment", "compressed_tensors", *SHORT, "--json")
    return {e["profile"]["name"]: e for e in json.loads(asked(capsys, *words))}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match")  # peft's own, of its table for experts
@pytest.mark.parametrize(
    ("family", "mode"),
    [*((f, mode) for f in MULTIMODAL for mode in LORA), *((f, "w4a4") for f in MULTIMODAL_MIXTURES)],
)
def test_the_text_model_of_a_multimodal_folder_is_trained_and_what_sees_stays_as_it_was(
    family, mode, in_process, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = folder_of(family, tmp_path / family)
    table = json.loads(asked(capsys, "sites", path, "--mode", mode, "--deployment", "compressed_tensors", "--json"))
    sites = {plan["site"] for plan in table["plans"]}
    assert len(sites) == 2 * SITES[family]
    stack = "language_model.model.layers." if family == "Llama4" else "model.language_model.layers."
    assert all(name.startswith(stack) for name in sites)
    asked(capsys, "scan", path, "format=mxfp4", "texts=4", "--advise", "advice.yaml")
    assert f" of {len(sites)} sites" in (tmp_path / "advice.yaml").read_text()
    begun = evaluated(capsys, path, mode)
    (tmp_path / "seeing.yaml").write_text(yaml.safe_dump(suite(path, mode, family)))
    asked(capsys, "plan", "seeing.yaml", "arms.all=+advice.yaml")
    asked(capsys, "run", "seeing.yaml")
    runs = {arm: next((tmp_path / "runs" / "seeing").glob(f"{arm}-s0-*")) for arm in ("all", "lora")}
    for run in runs.values():
        evidence = [json.loads(line) for line in (run / "evidence.jsonl").read_text().splitlines()]
        assert next(line for line in evidence if line["kind"] == "live_equals_fresh")["max_difference"] == 0.0
        rounded = {(row["phase"], row["site"], row["point"]) for row in evidence if row.get("elements")}
        phases, points = ("rollout", "training", "evaluation"), ("weight", "input")
        assert rounded == {(phase, site, point) for phase in phases for site in sites for point in points}
        spec = yaml.safe_load((run / "spec.yaml").read_text())
        (tmp_path / "deployed.yaml").write_text(yaml.safe_dump({**spec["injection"], "mode": None}))
        again = evaluated(capsys, run / "final", mode, "-p", "deployed=deployed.yaml")
        again["deployment"] = again.pop("deployed")
        last = {e["profile"]["name"]: e for e in evidence if e["kind"] == "evaluation" and e.get("last")}
        for name in ("full", mode, "deployment"):
            same = ("answers_digest", "strict", "flexible", "mean_length", "n")
            assert {key: again[name][key] for key in same} == {key: last[name][key] for key in same}
            assert again[name]["answers_digest"] != begun.get(name, begun[mode])["answers_digest"]
        assert {name: (run / "final" / name).read_text() for name in PROCESSOR} == PROCESSOR
    opens_as_it_came(path, runs["all"])
    adapters = load_file(runs["lora"] / "final" / "adapter_model.safetensors")
    on = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapters}
    linear = {name for name in sites if ".experts." not in name}
    experts = {name.rpartition(".")[0] for name in sites - linear}
    assert on == linear | experts | {f"{name}.base_layer" for name in experts}
    assert all(tensor.any() for name, tensor in adapters.items() if ".lora_B" in name)


def opens_as_it_came(path, run):
    """The saved folder opens with plain transformers; its keys, and all but the text model, are those of the start."""
    start, final = (load_file(folder / "model.safetensors") for folder in (path, run / "final"))
    assert final.keys() == start.keys()
    assert {name: t.dtype for name, t in final.items()} == {name: t.dtype for name, t in start.items()}
    moved = {name for name, tensor in final.items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if not SEEING.search(name)}
    config = json.loads((run / "final" / "config.json").read_text())
    assert config["architectures"] == json.loads((path / "config.json").read_text())["architectures"]
    named = getattr(transformers, config["architectures"][0])
    for kind in (AutoModelForImageTextToText, named):
        model, report = kind.from_pretrained(run / "final", output_loading_info=True)
        assert type(model) is named
        assert not any(report.values())
    text = sum(final[name].numel() for name in moved)
    evidence = [json.loads(line) for line in (run / "evidence.jsonl").read_text().splitlines()]
    assert next(line for line in evidence if line["kind"] == "moved")["trainable"] == text
