"""vLLM as a sampler on this machine's CPU, in this process and as a server (`make test-vllm`; elsewhere skipped).

The oracle is vLLM itself: the log-probabilities that it computes with its own kernels, in its own attention.
"""

import json
from copy import deepcopy

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm makes an environment with it")

from processes import ran
from scores import SAMPLED, audited, distances, fed, load_into, near, prompts, rollout, scored

from fp4rl.cli.main import main
from fp4rl.engines.rollout.held import held, require_held
from fp4rl.noise.perturb import perturb
from fp4rl.rl.generate import Sampling, transformers_sampler
from fp4rl.rl.lora import with_lora
from fp4rl.rl.stream import weight_stream
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Lora
from fp4rl.spec.noise import Noise


@pytest.fixture(params=["engine", "remote"])
def either(request):
    """vLLM in this process, then a server."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("mode", ["none", "w4a16", "nvfp4_w4a16"])
def test_log_probabilities_are_those_of_the_model(mode, either, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with rollout(model, Injection.named(mode)):
        answers = either(model, tokenizer, asked, SAMPLED)
        assert distances(model, asked, answers).max() < 1e-5


@pytest.mark.parametrize("mode", ["w4a8", "w4a4", "nvfp4_w4a4"])
def test_rounded_inputs_are_rounded_in_vllm_and_counted_to_the_element(mode, either, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with rollout(model, Injection.named(mode, "compressed_tensors")) as attachment:
        answers = either(model, tokenizer, asked, SAMPLED)
        attachment.require_calls()
        rows = {(row.site, row.point): row for row in attachment.evidence()}
        tokens = sum(map(len, fed(asked, answers)))
        for site in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            assert rows[f"model.layers.0.{site}", "input"].elements == tokens * 64
        down = rows["model.layers.1.mlp.down_proj", "input"]
        assert down.elements == tokens * 192
        assert down.calls >= max(len(answer.tokens) for answer in answers)
        assert down.share_changed > 0.5
        assert down.looks
        assert {row.elements for row in rows.values() if row.point == "weight"} - {0}
        attachment.set_phase("evaluation")
        assert near(model, asked, answers) >= 0.99
        attachment.set_phase("reference")
        assert near(model, asked, answers) < 0.5  # unrounded it is another policy


def test_noise_on_weights_is_in_vllm_and_is_gone_afterwards(either, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with rollout(model, Injection.named("w4a16")) as attachment:
        with perturb(model, Noise(), 0.3, generator=torch.Generator().manual_seed(1)):
            attachment.invalidate()
            answers = either(model, tokenizer, asked, SAMPLED)
            assert distances(model, asked, answers).max() < 1e-5
        attachment.invalidate()
        assert distances(model, asked, answers).max() > 1e-2
        assert distances(model, asked, either(model, tokenizer, asked, SAMPLED)).max() < 1e-5


def test_sharp_attention_is_no_further_from_float64_than_in_transformers(engine, policy):
    """Kind: rounding of float32 itself. Training sharpens attention, which multiplies the last bits of any program."""
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(10)
    answers = engine(model, tokenizer, asked, SAMPLED)
    exact = deepcopy(model).double()
    here = distances(exact, asked, answers)
    there = (scored(model, asked, answers) - scored(exact, asked, answers)).abs()
    assert there.max() > 1e-5  # transformers is no nearer to itself in float64
    assert here.max() < 4 * there.max()
    assert here.mean() < 4 * there.mean()


def test_a_tied_head_follows_its_embedding(either, policy):
    """Kind: a stale cache: vLLM packs the head's weight for itself and forgets it in a reload."""
    model, tokenizer = policy
    asked = prompts(tokenizer)
    either(model, tokenizer, asked, SAMPLED)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5).add_(torch.randn_like(model.model.embed_tokens.weight), alpha=0.1)
    assert distances(model, asked, either(model, tokenizer, asked, SAMPLED)).max() < 1e-5


@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_adapters_are_merged_on_the_way(lora, engine, folder, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    adapted = with_lora(model, Lora(rank=4, alpha=8.0), folder).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    with rollout(adapted, Injection.model_validate({"weight": "mxfp4", "lora": lora})):
        assert distances(adapted, asked, engine(adapted, tokenizer, asked, SAMPLED)).max() < 2e-5
    with (
        rollout(adapted, Injection.model_validate({"mode": "w4a4", "lora": "adapter"})),
        pytest.raises(InvalidValueError, match="lora: merged"),
    ):
        engine(adapted, tokenizer, asked, SAMPLED)


def test_greedy_answers_stops_and_limits_are_those_of_transformers(either, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    for stop in ((), ("3",), ("+ 1",)):
        sampling = Sampling(12, stop=stop)
        one, other = either(model, tokenizer, asked, sampling), transformers_sampler(model, tokenizer, asked, sampling)
        assert [(a.tokens, a.text, a.ended) for a in one] == [(a.tokens, a.text, a.ended) for a in other]


def test_what_is_drawn_follows_from_torchs_generator_alone(either, policy):
    model, tokenizer = policy
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append([a.tokens for a in either(model, tokenizer, prompts(tokenizer), SAMPLED)])
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
    with rollout(model, Injection.model_validate({"weight": "mxfp4", "dtype": "float32"})):
        load_into(engine, list(weight_stream(model)))
    with rollout(model, Injection.named("w4a16")), pytest.raises(CheckFailed, match="the engine holds other weights"):
        require_held(engine.module, weight_stream(model))


def test_what_vllm_does_not_compute_is_refused(engine, policy):
    model, tokenizer = policy
    for described, word in (
        ({"output": "mxfp4"}, "output"),
        ({"kv_cache": "mxfp8", "errors": [{"point": "scores"}]}, "relative@scores"),
    ):
        with (
            rollout(model, Injection.model_validate(described)),
            pytest.raises(InvalidValueError, match=f"does not compute {word}"),
        ):
            engine(model, tokenizer, prompts(tokenizer), SAMPLED)


def test_the_audit_from_the_command_line(folder, capsys):
    checks, _ = audited(capsys, folder, "--engine", "vllm", "--mode", "w4a4")
    assert [check["passed"] for check in checks.values()] == [True] * 4
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
  model: {{embedded: {{warm_up_steps: 60}}}}
  training: {{steps: 2, train_batch_size: 4, mini_batch_size: 4, rollout_n: 4}}
  evaluation: {{count: 12, batch_size: 12}}
  rollout: {{engine: vllm, {where}}}
arms:
  w4a4: {{injection: {{mode: w4a4, deployment: compressed_tensors}}}}
  noisy: {{injection: {{mode: w4a16}}, noise: {{}}}}
  cached: {{injection: {{mode: w4a8, kv_cache: mxfp8}}}}
seeds: [0]
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "server"])
def test_two_steps_of_a_run_are_sampled_by_vllm(where, request, tmp_path):
    server = f"server: '{request.getfixturevalue('address')}'" if where == "server" else ""
    runs = ran(tmp_path, SUITE.format(where=server or "max_model_len: 128"))
    assert set(runs) == {"w4a4", "noisy", "cached"}
    for arm, (result, rollouts, rows) in runs.items():
        assert result["steps_done"] == 2
        assert {e["profile"]["sampling"] for e in result["evaluations"]} == {"greedy, by vllm"}
        assert rollouts
        assert all(row["calls"] > 0 for row in rollouts)
        assert any(row["elements"] > 0 for row in rollouts if row["point"] == "weight")
        cached = [row["elements"] for row in rollouts if row["point"] == "kv_cache"]
        assert (len(set(cached)) == 1 and cached[0] > 0) if arm == "cached" else not cached
        served = [row for row in rows if row["kind"] == "weights_served" and "profile" not in row]
        assert {row["step"] for row in served} == ({0, 1} if server else set())  # dynamic sampling may serve more
        assert len({row["weight_version"] for row in served}) == len(served)
