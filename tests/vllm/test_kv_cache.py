"""A rounded KV cache in vLLM on this machine's CPU (`make test-vllm`; elsewhere these are skipped).

The oracles are transformers under the same injection, a token at a time over its own cache, and a rounding of its
unrounded keys and values that is written out here.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm makes an environment with it")

from planted_worker import keys_alone, unstored
from scores import SAMPLED, audited, fed, near, prompts, rollout
from transformers import Qwen3Config, Qwen3ForCausalLM

from fp4rl.engines.rollout import kinds
from fp4rl.engines.rollout.vllm import Vllm
from fp4rl.models.load import load
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.generate import Sampling, transformers_sampler
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.injection import Injection

HEADS, STORED, SIZE = 4, 2, 64  # grouped heads of two MX blocks; vLLM's kernel for CPUs takes multiples of 32
LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("grouped"), build_tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=STORED,
            head_dim=SIZE,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            dtype="float32",
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(std=0.06)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def decoded(model, asked, answers):
    """The log-probability of every token of the answers in transformers, read from its cache a token at a time."""
    found = []
    with torch.no_grad():
        for number, answer in enumerate(answers):
            given, cache = torch.tensor([asked[number // SAMPLED.count]]), None
            for token in answer.tokens:
                out = model(given, past_key_values=cache, use_cache=True)
                found.append(out.logits[0, -1].double().log_softmax(-1)[token])
                given, cache = torch.tensor([[token]]), out.past_key_values
    return torch.stack(found)


def cache_rows(attachment, phase="rollout"):
    return [row for row in attachment.evidence() if row.point == "kv_cache" and row.phase == phase]


PER_TOKEN = {"name": "nvfp4", "factor": "per_token"}
DESCRIBED = [
    {"kv_cache": "mxfp8"},
    {"kv_cache": "mxfp4"},
    {"kv_cache": PER_TOKEN},
    {"mode": "w4a8", "kv_cache": "mxfp8"},
    {"mode": "w4a4", "deployment": "compressed_tensors", "kv_cache": "mxfp4"},
]


@pytest.mark.parametrize("described", DESCRIBED, ids=str)
def test_tokens_score_as_in_transformers_over_its_own_rounded_cache(described, engine, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with rollout(model, Injection.model_validate(described)) as attachment:
        answers = engine(model, tokenizer, asked, SAMPLED)
        attachment.require_calls()
        attachment.set_phase("evaluation")
        assert near(model, asked, answers, decoded) >= 0.99
        attachment.set_phase("reference")
        assert near(model, asked, answers, decoded) < 0.5  # unrounded it is another policy


def test_the_elements_are_those_that_transformers_rounds_for_the_same_tokens(engine, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with rollout(model, Injection.model_validate({"kv_cache": "mxfp8"})) as attachment:
        answers = engine(model, tokenizer, asked, SAMPLED)
        attachment.set_phase("evaluation")
        for tokens in fed(asked, answers):
            model(torch.tensor([tokens]))
        rows, own = cache_rows(attachment), cache_rows(attachment, "evaluation")
        tokens = sum(map(len, fed(asked, answers)))
        assert [row.elements for row in rows] == [row.elements for row in own] == [tokens * 2 * STORED * SIZE] * LAYERS
        assert all(row.calls >= max(len(answer.tokens) for answer in answers) for row in rows)
        assert all(row.looks and not row.missed and row.share_changed > 0.5 for row in rows)
        for row, other in zip(rows, own, strict=True):
            assert row.relative_error == pytest.approx(other.relative_error, rel=0.05)


# -- the values in the cache


@contextmanager
def written(engine, layer=0):
    """The keys and values [tokens, heads, size] that vLLM writes into the cache of a layer, call by call."""
    attention, kept = engine.module.model.layers[layer].self_attn.attn, []
    write = attention.impl.do_kv_cache_update

    def keep(layer, key, value, *others):
        kept.append((key.clone(), value.clone()))
        write(layer, key, value, *others)

    attention.impl.do_kv_cache_update = keep
    try:
        yield kept
    finally:
        del attention.impl.do_kv_cache_update


def mxfp8(x):
    """Of a copy in bfloat16, OCP MX v1.0, 6.3: a block of 32 under 2^(floor(log2 max) - 8), elements in E4M3."""
    blocks = x.bfloat16().double().reshape(*x.shape[:-1], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = 2.0 ** (torch.floor(torch.log2(largest)) - 8)
    return (scale * e4m3(blocks / scale)).reshape(x.shape)


def e4m3(x):
    step = 2.0 ** (torch.floor(torch.log2(x.abs().clamp(min=2.0**-6))) - 3)  # subnormals have the steps of 2^-6
    return (torch.round(x / step) * step).clamp(-448, 448)  # torch.round: half to even


def unrounded_cache(model, tokens, layer=0):
    """The keys and values [tokens, heads, size] in transformers' cache, without injection."""
    with torch.no_grad():
        held = model(torch.tensor([tokens]), use_cache=True).past_key_values.layers[layer]
    return [x[0].transpose(0, 1) for x in (held.keys, held.values)]


def test_the_cache_holds_transformers_keys_and_values_rounded_value_by_value(engine, policy):
    """Exact where the last bits of float32, in which two programs differ, do not decide to which side a value goes."""
    model, tokenizer = policy
    prompt = prompts(tokenizer)[4]
    own = unrounded_cache(model, prompt)
    with rollout(model, Injection.model_validate({"kv_cache": "mxfp8"})):
        engine(model, tokenizer, [prompt], Sampling(1))
        with written(engine) as kept:
            engine(model, tokenizer, [prompt], Sampling(1))
    stored = [torch.cat(parts).double() for parts in zip(*kept, strict=True)]
    for mine, theirs in zip(own, stored, strict=True):
        assert mine.shape == theirs.shape == (len(prompt), STORED, SIZE)
        firm = mxfp8(mine.double() * (1 - 2e-6)) == mxfp8(mine.double() * (1 + 2e-6))
        assert firm.double().mean() > 0.99
        assert torch.equal(theirs[firm], mxfp8(mine)[firm])
        assert (theirs != mine).double().mean() > 0.9


# -- planted faults


@contextmanager
def before_rotary(layer, members):
    """Round keys as their norm gives them, before the rotary embedding turns them."""
    (state,) = members
    norm = before_rotary.norms[layer]
    normed, compute = norm.forward, layer.forward

    def forward(query, key, value):
        state.count()
        return compute(query, key, state.stored(value.view(-1, STORED, SIZE)))

    layer.forward = forward
    norm.forward = lambda key: state.stored(normed(key))
    yield
    del layer.forward, norm.forward


@contextmanager
def over_all_heads(layer, members):
    """Round keys and values of all heads as one long vector, turned by half a block."""
    (state,) = members
    compute = layer.forward

    def forward(query, key, value):
        state.count()
        key, value = (state.stored(x.roll(16, -1)).roll(-16, -1) for x in (key, value))
        return compute(query, key, value)

    layer.forward = forward
    yield
    del layer.forward


def plant(monkeypatch, fault):
    whole = kinds.KINDS
    monkeypatch.setattr(kinds, "KINDS", {**whole, "attention": replace(whole["attention"], rounding=fault)})


@pytest.mark.parametrize("fault", [keys_alone, before_rotary, over_all_heads])
def test_a_planted_fault_is_another_policy(fault, engine, policy, monkeypatch):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with rollout(model, Injection.model_validate({"kv_cache": "mxfp4"})) as attachment:
        engine(model, tokenizer, asked, SAMPLED)
        before_rotary.norms = {each.self_attn.attn: each.self_attn.k_norm for each in engine.module.model.layers}
        plant(monkeypatch, fault)
        answers = engine(model, tokenizer, asked, SAMPLED)
        attachment.set_phase("evaluation")
        assert near(model, asked, answers, decoded) < 0.5


def test_a_cache_that_is_not_rounded_stops_the_run(engine, policy, monkeypatch):
    model, tokenizer = policy
    plant(monkeypatch, unstored)
    with rollout(model, Injection.model_validate({"kv_cache": "mxfp8"})) as attachment:
        engine(model, tokenizer, prompts(tokenizer), SAMPLED)
        with pytest.raises(CheckFailed, match="never called during rollout"):
            attachment.require_calls()


# -- what is refused, and what is as before


def test_caches_that_are_none_of_keys_and_values_in_the_models_dtype_are_refused(engine, policy, monkeypatch):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    engine(model, tokenizer, asked, SAMPLED)
    attention = engine.module.model.layers[1].self_attn.attn
    for where, key, value, words in (
        (engine.module, "is_hybrid", True, "rounds: Qwen3ForCausalLM keeps states beside caches"),
        (
            attention,
            "kv_cache_torch_dtype",
            torch.float8_e4m3fn,
            r"1\.self_attn rounds: Attention stores auto.*targets.leave",
        ),
        (
            attention,
            "kv_sharing_target_layer_name",
            "x.attn",
            r"rounds: model\.layers\.1\.self_attn\.attn reads the cache of x.attn; take",
        ),
        (
            attention,
            "attn_type",
            "encoder_only",
            r"1\.self_attn rounds: Attention keeps no keys and values.*targets.leave",
        ),
    ):
        with monkeypatch.context() as other, rollout(model, Injection.model_validate({"kv_cache": "mxfp8"})):
            other.setattr(where, key, value, raising=False)
            with pytest.raises(InvalidValueError, match=words):
                engine(model, tokenizer, asked, SAMPLED)
        with rollout(model, Injection.model_validate({"weight": "mxfp4"})):
            engine(model, tokenizer, asked, SAMPLED)


def test_a_cache_that_is_left_alone_in_rollouts_is_not_asked_for(engine, policy):
    model, tokenizer = policy
    described = {"mode": "w4a16", "kv_cache": "mxfp8", "apply_during": {"kv_cache": ["training"]}}
    with rollout(model, Injection.model_validate(described)) as attachment:
        answers = engine(model, tokenizer, prompts(tokenizer), SAMPLED)
        assert not cache_rows(attachment)
        assert near(model, prompts(tokenizer), answers, decoded) >= 0.99


def test_greedy_answers_are_those_of_the_trainers_own_generation(engine, policy):
    model, tokenizer = policy
    asked, greedy = prompts(tokenizer), Sampling(12, logps=True)
    with rollout(model, Injection.model_validate({"mode": "w4a8", "kv_cache": "mxfp8"})):
        theirs = engine(model, tokenizer, asked, greedy)
        own = transformers_sampler(model, tokenizer, asked, greedy)
        assert [answer.tokens for answer in theirs] == [answer.tokens for answer in own]
        apart = torch.cat([a.logps - b.logps for a, b in zip(theirs, own, strict=True)]).abs()
        assert (apart < 1e-4).double().mean() >= 0.99


def test_the_audit_tells_of_the_cache_from_the_command_line(folder, tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text(
        f"model: {{path: {folder}, dtype: float32}}\ninjection: {{mode: w4a8, kv_cache: mxfp8}}\n"
    )
    checks, _ = audited(capsys, tmp_path / "spec.yaml", "--engine", "vllm", "--runs", tmp_path / "runs")
    assert {name: check["passed"] for name, check in checks.items()} == {
        "weights": True,
        "kv_cache": None,
        "scores": True,
        "refresh": True,
        "order": True,
    }
    numbers = checks["kv_cache"]["numbers"]
    assert numbers["sites"] == LAYERS
    assert numbers["elements"] % (2 * STORED * SIZE * LAYERS) == 0 < numbers["elements"]
    assert numbers["rollout_error"] == pytest.approx(numbers["training_error"], rel=0.1)


def test_an_engine_answers_for_the_model_that_it_is_given(folder, policy, tmp_path):
    """Kind: stale settings: weights come with every call, and what else a folder says (rotary base) must too."""
    model, tokenizer = policy
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 100.0}
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine, (other, _), asked = Vllm(), load(tmp_path), prompts(tokenizer)
    for own, another in ((load(folder)[0], other), (other, load(folder)[0])):
        answers = engine(own, tokenizer, asked, SAMPLED)
        assert near(own, asked, answers, decoded) >= 0.99
        assert near(another, asked, answers, decoded) < 0.5
