"""Memory against a model that torch builds and weighs, time against runs whose times are known."""

import json

import pytest
import torch

from fp4rl.cli.main import main
from fp4rl.lab import estimates
from fp4rl.lab.estimates import adapter_size, memory_of, shapes_of, time_of
from fp4rl.lab.matrix import single
from fp4rl.lab.runs import read_run
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.model import Lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))
    where = tmp_path_factory.mktemp("model")
    (where / "config.json").write_text("{}")
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    save_file(dict(list(weights.items())[:5]), where / "model-1.safetensors")
    save_file(dict(list(weights.items())[5:]), where / "model-2.safetensors")
    return where, model


def experiment(folder, **parts):
    model = {"path": str(folder), **parts.pop("model", {})}
    return Experiment.model_validate({"model": model, **parts})


def test_the_parts_are_those_of_a_model_that_torch_weighs(folder):
    where, model = folder
    count = sum(weight.numel() for weight in model.parameters())
    plain = memory_of(experiment(where, training={"algorithm": "grpo", "kl_loss_coef": 0.0})).parts
    assert plain == {"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count}
    states = torch.optim.AdamW(model.parameters())
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    states.step()
    kept = sum(value.numel() * 4 for each in states.state.values() for value in each.values() if value.numel() > 1)
    assert plain["optimizer"] == kept
    half = memory_of(
        experiment(where, model={"dtype": "bfloat16"}, injection="w4a8", training={"kl_loss_coef": 0.1})
    ).parts
    linear = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    )
    assert half == {
        "weights": 2 * count,
        "FP32 masters": 4 * count,
        "gradients": 4 * count,
        "optimizer": 8 * count,
        "reference": 2 * count,
        "rounded copies": 2 * linear,
    }
    eight = memory_of(experiment(where, training={"optimizer": "adamw_torch_8bit", "kl_loss_coef": 0.0}))
    assert eight.parts["optimizer"] == 2 * count
    split = memory_of(experiment(where, processes=2, sharding="fsdp2", training={"kl_loss_coef": 0.0}))
    assert split.parts["optimizer"] == 4 * count


def test_an_adapter_is_counted_as_peft_makes_it(folder):
    import copy

    from fp4rl.rl.lora import with_lora

    where, model = folder
    for lora in (Lora(rank=4), Lora(rank=2, target_modules=("q_proj", "down_proj"))):
        adapted = with_lora(copy.deepcopy(model), lora, where)
        made = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
        assert adapter_size(shapes_of(where), lora) == made
        memory = memory_of(experiment(where, model={"dtype": "bfloat16", "lora": lora.model_dump()}))
        assert (memory.parts["adapter"], memory.parts["optimizer"]) == (4 * made, 8 * made)


def test_packed_weights_and_the_embedded_model_are_not_guessed(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight_packed": torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    assert memory_of(experiment(tmp_path)) is None
    assert memory_of(Experiment()) is None
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    assert memory_of(experiment(tmp_path)) is None


def test_time_is_that_of_the_same_experiment_or_of_its_kind_by_the_step(make_run):
    from fp4rl.spec.load import parse

    runs = [read_run(make_run("a", seed, wall_s=wall)) for seed, wall in enumerate((100.0, 140.0, 120.0))]
    described = parse(Experiment, {k: v for k, v in runs[0].spec.items() if v is not None}, "")
    planned = single(described.model_copy(update={"seed": 9}), "mine")
    same = [run for run in runs if run.experiment == runs[0].experiment]
    assert len(same) == 3
    other = described.model_copy(update={"training": described.training.model_copy(update={"lr": 1e-5, "steps": 15})})
    like = read_run(make_run("b", 0, spec=described.model_dump(mode="json"), wall_s=120.0))
    assert time_of(single(other, "mine"), [like]) == (pytest.approx(120.0 / 30 * 15), "1 run like it")
    assert time_of(planned, [like, *runs]) == (120.0, "1 run of this experiment")
    far = described.model_copy(update={"processes": 4})
    assert time_of(single(far, "mine"), [like]) is None


def test_plan_says_what_a_run_will_take_and_when_it_is_too_much(folder, tmp_path, monkeypatch, capsys):
    where, model = folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimates, "available", lambda: ("a small card", 2.0**20))
    (tmp_path / "mine.yaml").write_text(f"model: {{path: {where}}}\ntask: {{name: arithmetic}}\n")
    assert main(["plan", "mine.yaml"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    count = sum(weight.numel() for weight in model.parameters())
    assert f"memory of run, a process: at least {16 * count / 2**30:.3g} GiB (weights" in shown
    assert "more than the 0.000977 GiB of a small card" in shown
    assert "time:" not in shown
    assert main(["plan", "mine.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["arm"] == "run"
