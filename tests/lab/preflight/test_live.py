"""Checks of a model with its weights: each with the very defect planted, and a clean case beside it."""

import pytest
import torch

from fp4rl.inject.attach import Attachment
from fp4rl.lab.preflight import live
from fp4rl.models.load import load
from fp4rl.rl.inputs import start_folder

W4A4 = {"injection": {"mode": "w4a4", "deployment": "compressed_tensors"}}


def told(rows):
    return [(row.verdict, row.measured) for row in rows]


@pytest.fixture
def model(subject):
    """The model that the subjects of these tests start from; it is read again for each test."""
    own = subject()
    live.loaded.cache_clear()
    yield live.model_of(own.arms["a"], own.root)
    live.loaded.cache_clear()


def test_masters_that_a_forward_loses_fail(subject, rows, model, monkeypatch):
    """Hooks that swap in a rounded weight and give the master back in the backward alone, as the fork's did."""
    (row,) = rows(live, "masters", subject(a=W4A4))
    assert row.verdict == "pass"
    assert row.measured.endswith("after forwards without gradient, checkpointed, interrupted")
    layer = model.model.layers[0].mlp.down_proj
    kept = []

    def swap(*_):
        kept.append(layer.weight.detach().clone())
        layer.weight.data.mul_(1 + 2**-8)

    def give_back(*_):
        layer.weight.data.copy_(kept[0])

    layer.register_forward_pre_hook(swap)
    layer.register_full_backward_hook(give_back)
    monkeypatch.setattr(live, "model_of", lambda *_: model)
    (row,) = rows(live, "masters", subject(a=W4A4))
    assert row.verdict == "fail"
    assert row.measured.startswith("master weights changed in a forward without gradient")
    assert "interrupted" in row.measured


def test_masters_under_a_merged_adapter_are_hashed_around_an_interrupted_forward_too(subject, rows):
    merged = {"injection": W4A4["injection"] | {"lora": "merged"}, "model": {"lora": {}}}
    (row,) = rows(live, "masters", subject(a=merged))
    assert row.verdict == "pass", row


def test_an_injection_that_rounds_nothing_fails(subject, rows, model, monkeypatch):
    (row,) = rows(live, "rounded", subject(a=W4A4))
    assert row.verdict == "pass"
    assert "0 elements" not in row.measured

    def silent(self, phase):
        self.phase = phase
        for state in self.states.values():
            state.forget()
            state.enter(phase, frozenset())

    monkeypatch.setattr(Attachment, "set_phase", silent)
    (row,) = rows(live, "rounded", subject(a=W4A4))
    assert row.verdict == "fail"


def test_the_sites_that_are_counted_are_those_of_the_phases_that_act(subject, rows, model):
    """The logits of the unrounded model are those of a phase that the injection leaves out."""
    rollout = {"injection": W4A4["injection"] | {"apply_during": ["rollout"]}}
    (row,) = rows(live, "rounded", subject(a=rollout))
    assert row.measured.startswith("logits off by up to: rollout ")
    assert "training" not in row.measured


def test_noise_that_bfloat16_swallows_is_warned_of(subject, rows):
    """Norm weights are 1 at first: BF16 holds nothing between 1 and 1 + 2^-7, so 1e-5 changes none."""
    fine = {"noise": {"schedule": {"kind": "constant", "sigma": 1e-5}}}
    bf16 = {"model": {"embedded": {"warm_up_steps": 0}, "dtype": "bfloat16"}}
    (row,) = rows(live, "resolution", subject(bf16, a=fine))
    assert row.verdict == "warn"
    assert "bfloat16 will swallow all of its noise" in row.measured
    assert told(rows(live, "resolution", subject(a=fine))) == [("pass", "noise is kept in float32")]
    assert torch.tensor(1.0).bfloat16().add(2**-9) == 1


def test_an_adapter_that_is_its_own_base_fails(subject, rows, tmp_path):
    """Fresh adapters of peft have B = 0, so that they change nothing until they are trained."""
    peft = pytest.importorskip("peft")
    own = subject()
    spec = own.arms["a"]
    base = start_folder(spec.model, spec.task, own.root / "models")
    verdicts = {}
    for name, value in (("trained", 0.05), ("untrained", 0.0)):
        plain, tokenizer = load(base)
        adapted = peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for key, weight in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.constant_(weight, value)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        (row,) = rows(live, "adapter", subject({"model": {"path": str(tmp_path / name)}}))
        verdicts[name] = row.verdict
    assert verdicts == {"trained": "pass", "untrained": "fail"}
    assert rows(live, "adapter", own) == ()


def test_weights_that_are_not_here_are_waited_for(subject, rows, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (row,) = rows(live, "masters", subject({"model": {"path": str(tmp_path)}}, a=W4A4))
    assert (row.verdict, row.measured) == ("waits", f"no weights to read in {tmp_path}")
    assert rows(live, "masters", subject()) == ()  # nothing is injected
