"""Mixtures of experts under vLLM on this machine's CPU (`make test-vllm`; elsewhere these are skipped).

The oracles are transformers under the same injection, with its own products of experts, and vLLM's own kernel. Experts
are square, so that a transposed one has the right shape.
"""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm makes an environment with it")

from processes import free_port, ran, serving
from scores import SAMPLED, audited, distances, fed, let_go, load_into, near, prompts, rollout
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from fp4rl.cli.main import main
from fp4rl.engines.rollout import samplers, vllm
from fp4rl.engines.rollout.held import held, require_held
from fp4rl.engines.rollout.mixture import begin_reload
from fp4rl.engines.rollout.server import VllmServer
from fp4rl.engines.rollout.vllm import Vllm
from fp4rl.models.load import load
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.rl.generate import Sampling
from fp4rl.rl.stream import weight_stream
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection

SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512}
SIZES |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
OF = {
    "qwen3_moe": {"norm_topk_prob": True},
    "mixtral": {},
    "glm4_moe": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "gpt_oss": {"sliding_window": 64},
}


def made(family, path):
    """A folder of a tiny model of that family with weights far from the grid."""
    tokenizer = build_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | OF[family] | ids), vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if weight.ndim > 1 or "correction" in name:
            nn.init.normal_(weight, std=0.5 if "embed" in name or "correction" in name else 0.06)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral", "glm4_moe"])
def engine_and_folder(request, tmp_path_factory):
    one = Vllm()
    yield one, made(request.param, tmp_path_factory.mktemp(request.param))
    let_go(one)


@pytest.fixture
def sampled(engine_and_folder):
    engine, folder = engine_and_folder
    return engine, *load(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made("qwen3_moe", tmp_path_factory.mktemp("model"))


# -- what it computes


@pytest.mark.parametrize("mode", ["none", "w4a16", "nvfp4_w4a16"])
def test_log_probabilities_are_those_of_the_model(mode, sampled):
    engine, model, tokenizer = sampled
    asked = prompts(tokenizer)
    with rollout(model, Injection.named(mode)) as attachment:
        for _ in range(2):  # the second time experts have been packed before
            assert distances(model, asked, engine(model, tokenizer, asked, SAMPLED)).max() < 1e-5
        if mode != "none":
            attachment.require_calls()
            attachment.set_phase("reference")
            assert distances(model, asked, engine(model, tokenizer, asked, SAMPLED)).max() < 1e-5


def elements(attachment, phase):
    """Numbers rounded at each input in a phase."""
    rows = attachment.evidence()
    return {row.site: row.elements for row in rows if row.phase == phase and row.point == "input"}


@pytest.mark.parametrize("mode", ["w4a8", "w4a4", "nvfp4_w4a4"])
def test_inputs_of_both_products_are_rounded_in_vllm_and_counted_to_the_element(mode, sampled):
    engine, model, tokenizer = sampled
    asked = prompts(tokenizer)
    with rollout(model, Injection.named(mode, "compressed_tensors")) as attachment:
        answers = engine(model, tokenizer, asked, SAMPLED)
        attachment.require_calls()
        there = elements(attachment, "rollout")
        attachment.set_phase("training")
        with torch.no_grad():
            for tokens in fed(asked, answers):
                model(torch.tensor([tokens]))
        here = elements(attachment, "training")
        stacks = [site for site in here if "experts." in site and "shared" not in site]
        assert len(stacks) == (2 if model.config.model_type == "glm4_moe" else 4)
        assert here == there
        tokens = sum(map(len, fed(asked, answers)))
        assert {there[site] for site in stacks} == {tokens * 2 * 64}
        attachment.set_phase("evaluation")
        assert near(model, asked, answers) >= 0.99
        attachment.set_phase("reference")
        assert near(model, asked, answers) < 0.5  # unrounded it is another policy


@pytest.mark.parametrize("mode", ["none", "w4a4"])
def test_routes_are_those_of_the_model(mode, sampled):
    engine, model, tokenizer = sampled
    prompt = tokenizer("13 + 25 = 38, 40 + 3 = ")["input_ids"]
    here, there = [], []
    with rollout(model, Injection.named(mode, "compressed_tensors")):
        engine(model, tokenizer, [prompt], Sampling(1))
        routers = [m.router for m in engine.module.modules() if type(m).__name__ == "MoERunner"]
        chosen = [router.select_experts for router in routers]
        for router, choose in zip(routers, chosen, strict=True):

            def recorded(*args, choose=choose, **kwargs):
                weights, ids = choose(*args, **kwargs)
                there.append((ids.clone(), weights.clone()))
                return weights, ids

            router.select_experts = recorded
        engine(model, tokenizer, [prompt], Sampling(1))
        for router in routers:
            del router.select_experts
        experts = [m for name, m in model.named_modules() if name.endswith(".experts")]
        hooks = [m.register_forward_pre_hook(lambda _, args: here.append(args[1:])) for m in experts]
        with torch.no_grad():
            model(torch.tensor([prompt]))
        for hook in hooks:
            hook.remove()
    assert len(here) == len(there) == len(experts)
    for (ids, weights), (other, shares) in zip(here, there, strict=True):
        order, others = ids.argsort(-1), other.argsort(-1)
        assert torch.equal(ids.gather(-1, order), other.gather(-1, others).long())
        assert torch.allclose(weights.gather(-1, order), shares.gather(-1, others), atol=1e-5)


# -- the engine's experts against the stream


def test_every_tensor_of_the_stream_is_found_in_vllm(sampled):
    engine, model, tokenizer = sampled
    engine(model, tokenizer, prompts(tokenizer), SAMPLED)
    results = list(held(engine.module, weight_stream(model)))
    assert {each.name for each in results} == {name for name, _ in weight_stream(model)}
    assert not any(each.differing for each in results)
    buffers = sum(b.numel() for name, b in model.named_buffers() if "correction" in name)
    assert sum(each.values for each in results) == sum(p.numel() for p in model.parameters()) + buffers


DOWN, GATE, UP = (f"model.layers.1.mlp.experts.{{}}.{name}_proj.weight" for name in ("down", "gate", "up"))
ROUTER = "model.layers.0.mlp.gate.weight"


def transposed(weights, _):
    weights[DOWN.format(2)] = weights[DOWN.format(2)].mT.contiguous()


def gate_and_up_exchanged(weights, _):
    weights[GATE.format(3)], weights[UP.format(3)] = weights[UP.format(3)], weights[GATE.format(3)]


def experts_exchanged(weights, _):
    for part in (GATE, UP, DOWN):
        weights[part.format(0)], weights[part.format(3)] = weights[part.format(3)], weights[part.format(0)]


def expert_unrounded(weights, masters):
    weights[UP.format(1)] = masters[UP.format(1)]


def router_rounded(weights, masters):
    weights[ROUTER] = fake_quantize(masters[ROUTER], MXFP4)


def one_value(weights, _):
    weights[GATE.format(2)][5, 7] += 2.0**-20


PLANTED = [
    (transposed, [DOWN.format(2)], "experts were laid out transposed, or gate and up exchanged"),
    (gate_and_up_exchanged, [GATE.format(3), UP.format(3)], "experts were laid out transposed, or gate and up exchang"),
    (experts_exchanged, [p.format(e) for p in (GATE, UP, DOWN) for e in (0, 3)], "two experts were exchanged"),
    (expert_unrounded, [UP.format(1)], "or single experts, stayed in BF16"),
    (router_rounded, [ROUTER], "a router was rounded"),
    (one_value, [GATE.format(2)], "a refresh was missed"),
]


def faulty(plant):
    """A stream with a fault, as it would reach the engine."""

    def stream(model):
        weights = {name: tensor.clone() for name, tensor in weight_stream(model)}
        plant(weights, {name: tensor.detach() for name, tensor in masters(model)})
        return iter(weights.items())

    return stream


def masters(model):
    stacks = dict(model.named_parameters())
    yield ROUTER, stacks[ROUTER]
    yield UP.format(1), stacks["model.layers.1.mlp.experts.gate_up_proj"][1, 64:]


@pytest.mark.parametrize(("plant", "named", "_"), PLANTED)
def test_a_planted_difference_is_found_and_named_by_layer_and_expert(plant, named, _, engine, folder):
    model, tokenizer = load(folder)
    with rollout(model, Injection.named("w4a16")):
        engine(model, tokenizer, prompts(tokenizer), SAMPLED)
        require_held(engine.module, weight_stream(model))
        begin_reload(engine.module)
        load_into(engine, faulty(plant)(model))
        wrong = {each.name: each for each in held(engine.module, weight_stream(model)) if each.differing}
    assert set(wrong) == set(named)
    if plant is one_value:
        assert (wrong[named[0]].differing, wrong[named[0]].first) == (1, (5, 7))


@pytest.mark.parametrize(("plant", "named", "cause"), PLANTED)
def test_parity_fails_with_the_cause_of_a_planted_difference(plant, named, cause, engine, folder, monkeypatch, capsys):
    monkeypatch.setattr(samplers, "_vllm_here", lambda _: engine)
    monkeypatch.setattr(vllm, "weight_stream", faulty(plant))
    words = ["parity", str(folder), "--engine", "vllm", "--mode", "w4a16", "--count", "4", "--max-new-tokens", "4"]
    assert main(words) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "DIFFER weights" in said
    assert cause in said
    assert any(name in said.replace(" ", "") for name in named)


def test_experts_that_a_refresh_has_not_packed_again_are_found(engine, folder, monkeypatch, capsys):
    """Kind: vLLM 0.32 packs experts for its CPU kernel once, and a reload leaves them as they come."""
    model, tokenizer = load(folder)
    asked = prompts(tokenizer)
    engine(model, tokenizer, asked, SAMPLED)
    load_into(engine, weight_stream(model))
    wrong = [each for each in held(engine.module, weight_stream(model)) if each.differing]
    assert {each.name for each in wrong} == {
        part.format(e).replace("layers.1", f"layers.{n}") for part in (GATE, UP, DOWN) for e in range(4) for n in (0, 1)
    }
    assert all(each.differing > 0.9 * each.values for each in wrong)
    monkeypatch.setattr(samplers, "_vllm_here", lambda _: engine)
    monkeypatch.setattr(vllm, "begin_reload", lambda _: None)
    words = ["parity", str(folder), "--engine", "vllm", "--count", "4", "--max-new-tokens", "4"]
    assert main(words) == 1
    assert "keeps experts in an order of its own" in " ".join(capsys.readouterr().out.split())


def test_a_kernel_that_multiplies_by_something_else_than_it_holds_is_found(engine, folder, monkeypatch):
    model, tokenizer = load(folder)
    engine(model, tokenizer, prompts(tokenizer), SAMPLED)
    layers = [m for m in engine.module.modules() if isinstance(m, RoutedExperts)]
    apply = type(layers[1].quant_method).apply

    def stale(self, layer, x, topk_weights, topk_ids, *others):
        ids = torch.where(topk_ids == 2, 1, topk_ids) if layer is layers[1] else topk_ids
        return apply(self, layer, x, topk_weights, ids, *others)

    monkeypatch.setattr(type(layers[1].quant_method), "apply", stale)
    wrong = {each.name for each in held(engine.module, weight_stream(model)) if each.differing}
    assert wrong == {part.format(2) for part in (GATE, UP, DOWN)}


def test_an_unrounded_input_of_an_expert_stops_the_run(engine, folder, monkeypatch):
    from fp4rl.inject.experts import StackState

    model, tokenizer = load(folder)
    monkeypatch.setattr(StackState, "computed", lambda self, product: product.compute(product.x, product.weight))
    with rollout(model, Injection.named("w4a4", "compressed_tensors")) as attachment:
        engine(model, tokenizer, prompts(tokenizer), SAMPLED)
        with pytest.raises(CheckFailed, match=r"experts\.(gate_up|down)_proj"):
            attachment.require_calls()


# -- what is refused


def test_outputs_of_experts_are_refused(engine, folder):
    model, tokenizer = load(folder)
    with (
        rollout(model, Injection.model_validate({"output": "mxfp4"})),
        pytest.raises(InvalidValueError, match="does not compute output of"),
    ):
        engine(model, tokenizer, prompts(tokenizer), SAMPLED)


# -- a server, the command line, a whole run


def test_a_server_computes_the_same_and_counts(folder, tmp_path):
    port = free_port()
    with serving(folder, port, tmp_path / "log.txt"):
        engine = VllmServer(f"http://127.0.0.1:{port}")
        model, tokenizer = load(folder)
        asked = prompts(tokenizer)
        for mode, limit in (("w4a16", 1e-5), ("w4a4", 1e-4)):
            with rollout(model, Injection.named(mode, "compressed_tensors")) as attachment:
                answers = engine(model, tokenizer, asked, SAMPLED)
                assert engine.compare(model) == len(list(weight_stream(model)))
                attachment.require_calls()
                tokens = sum(map(len, fed(asked, answers)))
                counted = {row.site: row for row in attachment.evidence() if "experts." in row.site}
                assert len(counted) == 4
                found = elements(attachment, "rollout")
                assert {found[site] for site in counted if mode == "w4a4"} <= {tokens * 2 * 64}
                attachment.set_phase("evaluation")
                assert (distances(model, asked, answers) < limit).double().mean() >= (0.99 if mode == "w4a4" else 1)
        engine(model, tokenizer, asked, SAMPLED)
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[2] = model.model.layers[1].mlp.experts.down_proj[2].mT.clone()
        with pytest.raises(CheckFailed, match=r"layers\.1\.mlp\.experts\.2\.down_proj\.weight, in which"):
            engine.compare(model)


def test_the_audit_from_the_command_line(engine, folder, monkeypatch, capsys):
    monkeypatch.setattr(samplers, "_vllm_here", lambda _: engine)
    checks, _ = audited(capsys, folder, "--engine", "vllm", "--mode", "w4a4")
    assert [check["passed"] for check in checks.values()] == [True] * 4
    assert checks["weights"]["seen"] == "45 tensors of the stream, every value equal in vLLM"


def test_experts_that_vllms_reload_passes_by_are_refused(tmp_path):
    """Kind: a missed refresh: gpt-oss's own loader writes past the reload, and the former experts stay."""
    model, tokenizer = load(made("gpt_oss", tmp_path))
    one = Vllm()
    with pytest.raises(InvalidValueError, match=r"loads the experts of .* past vLLM's reload"):
        one(model, tokenizer, prompts(tokenizer), SAMPLED)
    let_go(one)


SUITE = """
suite: mixture
base:
  model: {{path: {folder}}}
  task: {{name: arithmetic, difficulty: 1}}
  training: {{steps: 2, train_batch_size: 2, mini_batch_size: 2, rollout_n: 4, max_response_length: 16,
    filter_groups: {{enable: false}}}}
  evaluation: {{count: 8, batch_size: 8, max_new_tokens: 16}}
  rollout: {{engine: vllm, max_model_len: 128}}
arms:
  w4a16: {{injection: {{mode: w4a16}}}}
  w4a4: {{injection: {{mode: w4a4, deployment: compressed_tensors}}}}
seeds: [0]
"""


@pytest.mark.slow
def test_two_steps_of_a_run_are_sampled_by_vllm(folder, tmp_path):
    runs = ran(tmp_path, SUITE.format(folder=folder))
    assert set(runs) == {"w4a16", "w4a4"}
    for result, rollouts, _ in runs.values():
        assert result["steps_done"] == 2
        experts = {row["site"] for row in rollouts if "experts." in row["site"] and row["calls"] > 0}
        assert len(experts) == 4
