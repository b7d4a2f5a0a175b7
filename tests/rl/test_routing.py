"""Experts that a rollout chose: recorded as transformers itself tells them, replayed as a router written by hand would.

The oracles are `output_router_logits` of transformers, routers written out below from each family's formula, and
figures worked by hand.
"""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl import routing
from fp4rl.rl.check import check
from fp4rl.rl.events import Message
from fp4rl.rl.generate import Sampling, transformers_sampler
from fp4rl.rl.routing import NOT_KNOWN, RouterWatch, padded_routes, whole_routes
from fp4rl.rl.run import Run
from fp4rl.rl.session import ResumeState, TrainingSession
from fp4rl.rl.train import train
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "num_experts_per_tok": 2,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_key_value_heads": 4}
FAMILIES = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "deepseek_v3": {"moe_intermediate_size": 64, **LATENT, **DEEPSEEK},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64},
}


def model_of(family, dtype=torch.float32):
    tokenizer = build_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **{**SIZES, **FAMILIES[family]}, **ends)
    config._attn_implementation = config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).to(dtype).eval(), tokenizer


# -- what is recorded


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_recorded_are_the_experts_that_the_model_itself_reports(family):
    """Kind: routes of another token, row or layer, shifted by the padding. Prompts of unequal length, padded."""
    model, tokenizer = model_of(family)
    prompts = tokenizer(["Q: Tom has 2 3 coins and 4 bags . A:", "Q: Ann has 4 . A:"])["input_ids"]
    torch.manual_seed(1)
    answers = transformers_sampler(model, tokenizer, prompts, Sampling(60, 1.0, count=2, logps=True, routes=True))
    assert len({len(answer.tokens) for answer in answers}) > 1, "every answer is as long: no cut would be seen"
    for answer, prompt in zip(answers, [prompts[0], prompts[0], prompts[1], prompts[1]], strict=True):
        fed = [*prompt, *answer.tokens][:-1]
        told = model(torch.tensor([fed]), output_router_logits=True).router_logits  # [tokens, experts] a layer
        wanted = torch.stack([layer.topk(2).indices for layer in told], dim=1)
        assert answer.routes.shape == (len(fed), 2, 2)
        assert torch.equal(answer.routes.long().sort(-1).values, wanted.sort(-1).values)


def test_routes_are_padded_like_the_tokens_they_belong_to():
    routes = [torch.tensor([[[5]], [[6]], [[7]]]), torch.tensor([[[1]], [[2]], [[3]], [[4]]])]
    before, after = padded_routes(routes, prompts=[2, 1], widths=(3, 4))
    assert before.flatten(1).tolist() == [[-1, 5, 6], [-1, -1, 1]]
    assert after.flatten(1).tolist() == [[7, -1, -1, -1], [2, 3, 4, -1]]
    assert whole_routes({"prompt_routes": before, "completion_routes": after}).shape == (2, 7, 1, 1)


def test_figures_of_the_load_worked_by_hand():
    """Four experts. Layer 0: 4 tokens on expert 0, 4 on expert 1; layer 1: two on each."""
    model, _ = model_of("qwen3_moe")
    layer0, layer1 = [[0, 1]] * 4, [[0, 1], [2, 3], [0, 1], [2, 3]]
    routes = torch.tensor([layer0, layer1]).transpose(0, 1).unsqueeze(0)  # [1, 4, 2 layers, 2]
    padding = torch.full((1, 2, 2, 2), NOT_KNOWN)
    batch = {"prompt_routes": padding, "completion_routes": routes, "completion_mask": torch.ones(1, 4)}
    stand_in = {name: torch.cat([part, part * 0]) for name, part in batch.items()}  # a row that counts nowhere
    for given in (batch, stand_in):
        assert RouterWatch(model).load(given) == pytest.approx(
            {"router/load_max": (2.0 + 1.0) / 2, "router/load_entropy": (0.5 + 1.0) / 2, "router/unused_share": 2 / 8}
        )


# -- what is replayed


class ByHand(nn.Module):
    """A router that is told its experts, and weighs them by its family's formula."""

    def __init__(self, router, given, weigh):
        super().__init__()
        self.router, self.given, self.weigh = router, given, weigh

    def forward(self, hidden):
        bias = getattr(self.router, "bias", None)
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.router.weight, bias)
        return logits, self.weigh(logits, self.given), self.given


def of_all(logits, given):
    picked = logits.softmax(-1).gather(-1, given)
    return picked / picked.sum(-1, keepdim=True)


def of_the_chosen(logits, given):
    return logits.gather(-1, given).softmax(-1)


def sigmoids(logits, given):
    picked = logits.sigmoid().gather(-1, given)
    return picked / (picked.sum(-1, keepdim=True) + 1e-20) * 2.5


WEIGHED = {"qwen3_moe": of_all, "mixtral": of_all, "gpt_oss": of_the_chosen, "deepseek_v3": sigmoids}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", WEIGHED)
def test_a_replay_computes_what_a_router_that_is_told_its_experts_computes(family, checkpointing):
    """Kind: other experts than the rollout's, or weights that are not theirs. Logits and every gradient, in float64."""
    model, tokenizer = model_of(family, torch.float64)
    ids = torch.randint(3, len(tokenizer), (3, 7), generator=torch.Generator().manual_seed(2))
    chance = torch.Generator().manual_seed(3)
    given = torch.rand(3, 7, 2, 4, generator=chance).argsort(-1)[..., :2]  # two of four experts: [rows, tokens, layers]
    cotangent = torch.randn(3, 7, len(tokenizer), generator=chance, dtype=torch.float64)

    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    watch = RouterWatch(model, replay=True)
    watch.prescribe(given)
    found = model(ids).logits
    (found * cotangent).sum().backward()
    own = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert 0.5 < watch.take()["router/flip_share"] < 1.0  # of six pairs of experts, one is the router's own
    watch.remove()

    model.zero_grad()
    model.gradient_checkpointing_disable()
    for layer, block in enumerate(model.model.layers):
        name = "router" if hasattr(block.mlp, "router") else "gate"
        setattr(block.mlp, name, ByHand(getattr(block.mlp, name), given[:, :, layer].flatten(0, 1), WEIGHED[family]))
    wanted = model(ids).logits
    (wanted * cotangent).sum().backward()
    theirs = {name.replace(".router.router.", ".router.").replace(".gate.router.", ".gate."): weight.grad
              for name, weight in model.named_parameters() if weight.grad is not None}  # fmt: skip
    assert own.keys() == theirs.keys()
    for name, value, right in [("logits", found, wanted), *((name, own[name], theirs[name]) for name in theirs)]:
        # Some routers compute in float32. An expert that no token met has no gradient.
        assert (value - right).norm() <= 1e-6 * right.norm(), name


def test_where_nothing_is_known_the_router_chooses_for_itself():
    model, _ = model_of("mixtral", torch.float64)
    ids = torch.arange(3, 11).unsqueeze(0)
    free = model(ids).logits
    watch = RouterWatch(model, replay=True)
    watch.prescribe(torch.full((1, 8, 2, 2), NOT_KNOWN))
    assert torch.equal(model(ids).logits, free)
    with watch.paused():
        watch.prescribe(torch.zeros(1, 8, 2, 2))
        assert torch.equal(model(ids).logits, free)
    watch.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_replay_that_does_not_reach_the_experts_is_found(monkeypatch):
    """Planted: the prescribed numbers are dropped on the way."""
    model, _ = model_of("qwen3_moe")
    watch = RouterWatch(model, replay=True)
    monkeypatch.setattr(routing._Choice, "__torch_function__", lambda _, f, t, args=(), kw=None: f(*args, **(kw or {})))
    for block in watch._blocks:
        block.natural.append(torch.zeros(1, 8, 2))
    monkeypatch.setattr(RouterWatch, "_enter", lambda _, block: setattr(block, "watched", True))
    watch.prescribe(torch.rand(1, 8, 2, 4).argsort(-1)[..., :2])
    model(torch.arange(3, 11).unsqueeze(0))
    with pytest.raises(CheckFailed, match=r"experts of \d+ of 16 places are not those of the rollout"):
        watch.take()


def test_a_mixture_whose_choice_cannot_be_seen_is_refused_by_name():
    model, _ = model_of("llama4_text")
    with pytest.raises(InvalidValueError, match=r"Llama4TextExperts.*leave training.routing_replay off"):
        RouterWatch(model, replay=True)
    with attach(model, Injection.named("w4a4")):
        assert RouterWatch(model).unseen.startswith(
            "model.layers.0.feed_forward.experts (Llama4TextExperts) is not handed"
        )
    assert not any(m._forward_hooks for m in model.modules())


# -- in a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def of(family):
        path = tmp_path_factory.getbasetemp() / f"routing-{family}"
        if not path.exists():
            model, tokenizer = model_of(family)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return of


def described(path, injection=None, **training):
    training = {
        "steps": 2,
        "train_batch_size": 4,
        "mini_batch_size": 2,
        "rollout_n": 4,
        "max_response_length": 16,
        "entropy_coeff": 1e-3,
        "overlong_buffer": {"enable": False},
        "filter_groups": {"enable": False},
        **training,
    }
    return Experiment.model_validate(
        {
            "model": {"path": str(path), "dtype": "float32"},
            "task": {"name": "arithmetic", "difficulty": 3, "train_count": 64},
            "injection": injection,
            "evaluation": {"count": 24, "max_new_tokens": 8},
            "training": training,
        }
    )


IN_ROLLOUTS = {"mode": "w4a4", "apply_during": ["rollout"]}


def first_update(path, tmp_path, **recipe):
    """Metrics of the first update of a run, before any weight has moved."""
    torch.set_num_threads(1)
    session = TrainingSession(Run(described(path, **recipe), tmp_path, path, lambda _: None), ResumeState())
    trainer = session.trainer
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": ""}] * 16)
    scored = trainer._old(batch)
    mask = batch["completion_mask"].bool()
    apart = (scored - batch["sampling_per_token_logps"]).masked_fill(~mask, 0.0)
    return trainer.routers.take()["router/flip_share"], apart.abs().max().item(), trainer._step_metrics


def test_routes_flip_where_rollout_and_training_round_otherwise_and_nowhere_else(folder, tmp_path):
    path = folder("qwen3_moe")
    alike, apart, metrics = first_update(path, tmp_path / "alike", injection={"mode": "w4a4"})
    assert alike == 0.0
    assert apart < 1e-5
    assert 0.0 < metrics["router/load_entropy"] <= 1.0 <= metrics["router/load_max"] <= 4.0
    unlike, apart, _ = first_update(path, tmp_path / "unlike", injection=IN_ROLLOUTS)
    assert 0.01 < unlike < 0.9
    replayed, nearer, _ = first_update(path, tmp_path / "replayed", injection=IN_ROLLOUTS, routing_replay=True)
    assert replayed > 0.01
    assert nearer < apart


def test_a_rollout_chooses_for_itself_whatever_was_scored_before(folder, tmp_path):
    """Kind: routes of one batch that stay prescribed for the next generation."""
    path, second = folder("qwen3_moe"), []
    for scored in (False, True):
        run = Run(described(path, routing_replay=True), tmp_path / str(scored), path, lambda _: None)
        trainer = TrainingSession(run, ResumeState()).trainer
        batch = trainer._generate_and_score_completions([{"prompt": ""}] * 16)
        if scored:
            trainer._score(trainer.model, batch)
        second.append(trainer._generate_and_score_completions([{"prompt": ""}] * 16))
    assert torch.equal(second[0]["completion_ids"], second[1]["completion_ids"])
    assert torch.equal(second[0]["completion_routes"], second[1]["completion_routes"])


def test_a_run_says_how_its_routers_did_and_replays(folder, tmp_path):
    path, lines = folder("qwen3_moe"), []

    def keep(event):
        lines.append(event)

    train(described(path, IN_ROLLOUTS, routing_replay=True), tmp_path / "run", tmp_path / "models", keep)
    steps = [event.metrics for event in lines if hasattr(event, "metrics") and "router/flip_share" in event.metrics]
    assert len(steps) == 2
    for metrics in steps:
        assert {"router/load_max", "router/load_entropy", "router/unused_share"} <= metrics.keys()
        assert 0.0 < metrics["router/flip_share"] < 1.0


def test_a_run_without_figures_of_routing_says_why(folder, tmp_path):
    lines = []
    path = folder("llama4_text")
    TrainingSession(Run(described(path), tmp_path, path, lines.append), ResumeState())
    assert any(isinstance(event, Message) and "no figures of routing" in event.line for event in lines)


def test_a_replay_for_a_model_without_experts_is_refused_before_the_run():
    """Fault: the run went to its end without a word, and nothing was replayed."""
    described = Experiment.model_validate({"training": {"routing_replay": True, "max_prompt_length": 128}})
    with pytest.raises(InvalidValueError, match="routing_replay: Qwen2ForCausalLM has no experts to choose; leave it"):
        check(described)
