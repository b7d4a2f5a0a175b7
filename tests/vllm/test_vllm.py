"""vLLM as a sampler on this machine's CPU (`make test-vllm`: an environment of its own; elsewhere these are skipped).

The oracle is vLLM itself: the log-probabilities that it computes with its own kernels, in its own attention.
"""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm makes an environment with it")

from fp4rl.cli.main import main
from fp4rl.engines.rollout.held import held, require_held
from fp4rl.engines.rollout.vllm import Vllm
from fp4rl.inject.attach import attach
from fp4rl.models.load import load
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.noise.perturb import perturb
from fp4rl.rl.generate import Sampling, transformers_sampler
from fp4rl.rl.lora import with_lora
from fp4rl.rl.stream import weight_stream
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded, Lora
from fp4rl.spec.noise import Noise

SAMPLED = Sampling(20, 1.0, count=2, logps=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("model"), build_tokenizer()
    torch.manual_seed(0)
    model = build(Embedded(), tokenizer)
    for weight in (p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name):
        torch.nn.init.normal_(weight, std=0.06)  # far from the grid, and inputs that matter
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine():
    return Vllm()


@pytest.fixture
def policy(folder):
    return load(folder)


def prompts(tokenizer):
    return [tokenizer(f"{a} + {b} = ")["input_ids"] for a in (2, 13, 40) for b in (3, 7, 25, 11)]


def distances(model, asked, answers):
    """|log-probability in vLLM - in this model, in one pass| of every token."""
    return (scored(model, asked, answers).float() - torch.cat([answer.logps for answer in answers])).abs()


def scored(model, asked, answers):
    """The log-probability of every token in this model, in one pass over each answer."""
    found = []
    with torch.no_grad():
        for number, answer in enumerate(answers):
            prompt = asked[number // SAMPLED.count]
            logits = model(torch.tensor([prompt + answer.tokens])).logits[0].double().log_softmax(-1)
            found.append(logits[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer.tokens)[:, None]).squeeze(-1))
    return torch.cat(found)


@pytest.mark.parametrize("mode", ["none", "w4a16", "nvfp4_w4a16"])
def test_log_probabilities_are_those_of_the_model(mode, engine, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with attach(model, Injection.named(mode)) as attachment:
        attachment.set_phase("rollout")
        answers = engine(model, tokenizer, asked, SAMPLED)
        assert distances(model, asked, answers).max() < 1e-5


@pytest.mark.parametrize("mode", ["w4a8", "w4a4", "nvfp4_w4a4"])
def test_rounded_inputs_are_rounded_in_vllm_and_counted(mode, engine, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with attach(model, Injection.named(mode, "compressed_tensors")) as attachment:
        attachment.set_phase("rollout")
        answers = engine(model, tokenizer, asked, SAMPLED)
        attachment.require_calls()
        rows = {(row.site, row.point): row for row in attachment.evidence()}
        tokens = sum(len(prompt) for prompt in asked) + sum(len(answer.tokens) - 1 for answer in answers)
        q = rows["model.layers.0.self_attn.q_proj", "input"]
        assert tokens * 64 <= q.elements <= (tokens + SAMPLED.count * sum(map(len, asked))) * 64
        assert {row.elements for row in rows.values() if row.point == "weight"} - {0}
        attachment.set_phase("evaluation")
        apart = distances(model, asked, answers)
        assert (apart < 1e-4).float().mean() >= 0.99
        with attach_none(attachment):
            assert (distances(model, asked, answers) < 1e-4).float().mean() < 0.5  # unrounded it is another policy


class attach_none:  # noqa: N801
    """The reference phase, in which nothing is rounded."""

    def __init__(self, attachment):
        self.attachment = attachment

    def __enter__(self):
        """Switch it off."""
        self.attachment.set_phase("reference")

    def __exit__(self, *_):
        """Switch it on again."""
        self.attachment.set_phase("rollout")


def test_noise_on_weights_is_in_vllm_and_is_gone_afterwards(engine, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with attach(model, Injection.named("w4a16")) as attachment:
        attachment.set_phase("rollout")
        with perturb(model, Noise(), 0.3, generator=torch.Generator().manual_seed(1)):
            attachment.invalidate()
            answers = engine(model, tokenizer, asked, SAMPLED)
            assert distances(model, asked, answers).max() < 1e-5
        attachment.invalidate()
        assert distances(model, asked, answers).max() > 1e-2
        assert distances(model, asked, engine(model, tokenizer, asked, SAMPLED)).max() < 1e-5


def test_sharp_attention_is_no_further_from_float64_than_in_transformers(engine, policy):
    """Kind: rounding of float32 itself. Training sharpens attention, which multiplies the last bits of any program."""
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(10)
    answers = engine(model, tokenizer, asked, SAMPLED)
    found = torch.cat([answer.logps for answer in answers]).double()
    exact, own = (scored(each, asked, answers) for each in (deepcopy(model).double(), model))
    here, there = (found - exact).abs(), (own - exact).abs()
    assert there.max() > 1e-5  # transformers is no nearer to itself in float64
    assert here.max() < 4 * there.max()
    assert here.mean() < 4 * there.mean()


def test_a_tied_head_follows_its_embedding(engine, policy):
    """Kind: a stale cache: vLLM packs the head's weight for itself and forgets it in a reload."""
    model, tokenizer = policy
    asked = prompts(tokenizer)
    engine(model, tokenizer, asked, SAMPLED)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5).add_(torch.randn_like(model.model.embed_tokens.weight), alpha=0.1)
    assert distances(model, asked, engine(model, tokenizer, asked, SAMPLED)).max() < 1e-5


@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_adapters_are_merged_on_the_way(lora, engine, folder, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    adapted = with_lora(model, Lora(rank=4, alpha=8.0), folder).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    with attach(adapted, Injection.model_validate({"weight": "mxfp4", "lora": lora})) as attachment:
        attachment.set_phase("rollout")
        assert distances(adapted, asked, engine(adapted, tokenizer, asked, SAMPLED)).max() < 2e-5
    with attach(adapted, Injection.model_validate({"mode": "w4a4", "lora": "adapter"})) as attachment:
        attachment.set_phase("rollout")
        with pytest.raises(InvalidValueError, match="lora: merged"):
            engine(adapted, tokenizer, asked, SAMPLED)


def test_greedy_answers_stops_and_limits_are_those_of_transformers(engine, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    for stop in ((), ("3",), ("+ 1",)):
        sampling = Sampling(12, stop=stop)
        one, other = engine(model, tokenizer, asked, sampling), transformers_sampler(model, tokenizer, asked, sampling)
        assert [(a.tokens, a.text, a.ended) for a in one] == [(a.tokens, a.text, a.ended) for a in other]


def test_what_is_drawn_follows_from_torchs_generator_alone(engine, policy):
    model, tokenizer = policy
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append([a.tokens for a in engine(model, tokenizer, prompts(tokenizer), SAMPLED)])
    assert drawn[0] == drawn[1] != drawn[2]


# -- the engine's weights against the stream


def test_every_tensor_of_the_stream_is_found_in_vllm(engine, policy):
    model, tokenizer = policy
    engine(model, tokenizer, prompts(tokenizer), SAMPLED)
    names = {name for name, _ in weight_stream(model)}
    results = list(held(engine.module, weight_stream(model)))
    assert {each.name for each in results} == names
    assert not any(each.differing for each in results)
    assert sum(each.values for each in results) == sum(p.numel() for p in model.parameters())


def missed_refresh(engine, model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.5


def left_out_of_a_fused_layer(engine, model):
    stream = [(n, t) for n, t in weight_stream(model) if "layers.1.self_attn.k_proj.weight" not in n]
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(2)
    load_into(engine, stream)


def exchanged(engine, model):
    weights = dict(weight_stream(model))
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]
    load_into(engine, weights.items())


def noise_twice(engine, model):
    """Noise of one step put on twice: the weights that were sent have it once, those of the engine twice."""
    noise = [torch.Generator().manual_seed(1) for _ in range(2)]
    with perturb(model, Noise(), 0.1, generator=noise[0]):
        once = {name: tensor.clone() for name, tensor in weight_stream(model)}
    sent = {name: tensor.clone() for name, tensor in weight_stream(model)}
    load_into(engine, [(name, once[name] + (once[name] - sent[name])) for name in sent])
    perturb(model, Noise(), 0.1, generator=noise[1]).__enter__()


def stale_head(engine, model):
    """A refresh without `follow_embeddings`, as vLLM alone does it."""
    with torch.no_grad():
        model.model.embed_tokens.weight[7] += 0.5
    load_into(engine, weight_stream(model))


def of_the_other_dtype(engine, model):
    """Rounding of the FP32 master where the trainer rounds its BF16 copy."""
    with attach(model, Injection.model_validate({"weight": "mxfp4", "dtype": "float32"})) as attachment:
        attachment.set_phase("rollout")
        load_into(engine, list(weight_stream(model)))


def load_into(engine, weights):
    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    worker.model_runner.reload_weights(weights_iterator=iter([(n, t.clone()) for n, t in weights]))


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (missed_refresh, "layers.0.mlp.up_proj.weight, in which 1 of"),
        (left_out_of_a_fused_layer, "layers.1.self_attn.k_proj.weight"),
        (exchanged, "layers.0.mlp.gate_proj.weight"),
        (noise_twice, "norm.weight"),
        (stale_head, "embed_tokens.weight, in which 64 of"),
    ],
)
def test_a_planted_difference_is_found_and_named(plant, named, engine, policy):
    model, tokenizer = policy
    engine(model, tokenizer, prompts(tokenizer), SAMPLED)
    require_held(engine.module, weight_stream(model))
    plant(engine, model)
    with pytest.raises(CheckFailed, match=named):
        require_held(engine.module, weight_stream(model))


def test_rounding_of_the_master_against_its_bf16_copy_is_found(engine, policy):
    model, tokenizer = policy
    engine(model, tokenizer, prompts(tokenizer), SAMPLED)
    of_the_other_dtype(engine, model)
    with attach(model, Injection.named("w4a16")) as attachment:
        attachment.set_phase("rollout")
        with pytest.raises(CheckFailed, match="the engine holds other weights"):
            require_held(engine.module, weight_stream(model))


def test_what_vllm_does_not_compute_is_refused(engine, policy):
    model, tokenizer = policy
    for described, word in (
        ({"output": "mxfp4"}, "output"),
        ({"kv_cache": "mxfp8", "errors": [{"point": "scores"}]}, "relative@scores"),
    ):
        with attach(model, Injection.model_validate(described)) as attachment:
            attachment.set_phase("rollout")
            with pytest.raises(InvalidValueError, match=f"does not compute {word}"):
                engine(model, tokenizer, prompts(tokenizer), SAMPLED)


def test_the_audit_from_the_command_line(folder, capsys):
    words = ["parity", str(folder), "--engine", "vllm", "--mode", "w4a4", "--count", "6", "--max-new-tokens", "8"]
    assert main([*words, "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert [check["passed"] for check in checks.values()] == [True, True, True]
    assert checks["weights"]["seen"] == "26 tensors of the stream, every value equal in vLLM"


def test_an_export_is_loaded_and_answers_as_the_policy_does(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(folder), str(out), "--to", "bf16", "--json"]) == 0
    capsys.readouterr()
    assert main(["verify", str(out), "--engine", "vllm", "--json"]) == 0
    check = json.loads(capsys.readouterr().out)["checks"][-1]
    assert (check["check"], check["differences"]) == ("vllm", [])
    assert check["compared"]["tokens"] > 100


# -- a whole run

SUITE = """
suite: sampled
base:
  model: {embedded: {warm_up_steps: 60}}
  training: {steps: 2, train_batch_size: 4, mini_batch_size: 4, rollout_n: 4}
  evaluation: {count: 12, batch_size: 12}
  rollout: {engine: vllm, max_model_len: 128}
arms:
  w4a4: {injection: {mode: w4a4, deployment: compressed_tensors}}
  noisy: {injection: {mode: w4a16}, noise: {}}
  cached: {injection: {mode: w4a8, kv_cache: mxfp8}}
seeds: [0]
"""


@pytest.mark.slow
def test_two_steps_of_a_run_are_sampled_by_vllm(tmp_path):
    (tmp_path / "suite.yaml").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "fp4rl", "run", "suite.yaml", "-j", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in (tmp_path / "runs" / "sampled").glob("*-s0-*"):
        result = json.loads((folder / "result.json").read_text())
        assert result["steps_done"] == 2
        assert {e["profile"]["sampling"] for e in result["evaluations"]} == {"greedy, by vllm"}
        rows = [json.loads(line) for line in (folder / "evidence.jsonl").read_text().splitlines()]
        rollout = [row for row in rows if row["kind"] == "injection" and row["phase"] == "rollout"]
        assert rollout
        assert all(row["calls"] > 0 for row in rollout)
        assert any(row["elements"] > 0 for row in rollout if row["point"] == "weight")
        cached = [row["elements"] for row in rollout if row["point"] == "kv_cache"]
        assert (len(set(cached)) == 1 and cached[0] > 0) if folder.name.startswith("cached") else not cached
