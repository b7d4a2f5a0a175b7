"""Weights of low precision are updated in FP32, and the model computes with their rounding and nothing else."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fp4rl.models.load import load
from fp4rl.rl.masters import Masters
from fp4rl.rl.trainer import Trainer
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.experiment import Experiment

ALONE = SimpleNamespace(num_processes=1, sync_gradients=True)


def layer():
    torch.manual_seed(0)
    return nn.Linear(32, 16, dtype=torch.bfloat16)


def updated(model, masters, updates, lr=1e-6):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    if masters is not None:
        masters.put_into(optimizer)
    x = torch.linspace(-1, 1, 32, dtype=torch.bfloat16)
    for _ in range(updates):
        model(x).float().square().sum().backward()
        if masters is not None:
            masters.take_gradients(ALONE)
        optimizer.step()
        optimizer.zero_grad()
        if masters is not None:
            masters.write()
    return model


def test_the_copies_go_the_way_of_plain_fp32_adamw_and_the_model_is_their_rounding():
    """An independent AdamW in float32, fed the gradients of the rounded weights."""
    model = layer()
    masters = Masters(model)
    plain = [weight.detach().float().requires_grad_() for weight in model.parameters()]
    optimizer = torch.optim.AdamW(plain, lr=1e-3, weight_decay=0.1)
    x = torch.linspace(-1, 1, 32, dtype=torch.bfloat16)
    for _ in range(5):
        rounded = [weight.detach().bfloat16().requires_grad_() for weight in plain]
        nn.functional.linear(x, *rounded).float().square().sum().backward()
        for weight, seen in zip(plain, rounded, strict=True):
            weight.grad = seen.grad.float()
        optimizer.step()
    updated(model, masters, 5, lr=1e-3)
    for weight, master, want in zip(model.parameters(), masters.parameters(), plain, strict=True):
        assert torch.equal(master, want)
        assert torch.equal(weight, want.bfloat16())


def test_small_updates_move_the_weights_in_the_end():
    """Updates below half a step of the dtype: in bfloat16 alone they are all lost."""
    start, coarse, fine = layer(), updated(layer(), None, 400), layer()
    updated(fine, Masters(fine), 400)
    shares = [float((m.weight != start.weight).float().mean()) for m in (coarse, fine)]
    assert shares[0] < 0.05 < 0.5 < shares[1], shares


def test_gradients_of_micro_batches_are_added_up_in_fp32():
    """1 + 256 x 1/256 is 2; a sum in bfloat16 stays at 1."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    masters = Masters(model)
    for value in (1.0, *[1 / 256] * 256):
        model.weight.grad = torch.full_like(model.weight, value)
        masters.take_gradients(ALONE)
    assert [master.grad.item() for master in masters.parameters()] == [2.0]
    assert model.weight.grad is None
    masters.drop_gradients()
    assert [master.grad for master in masters.parameters()] == [None]


def test_of_several_processes_the_gradients_of_every_micro_batch_are_averaged():
    """This process has 4 and then, averaged already, 3; the other had 2 and 3: (4 + 2) / 2 + 3."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    masters, others = Masters(model), torch.full((1, 1), 2.0)
    for value, shared in ((4.0, False), (3.0, True)):
        model.weight.grad = torch.full_like(model.weight, value)
        reduce = lambda mine, reduction: (mine + others) / 2 if reduction == "mean" else None  # noqa: E731
        masters.take_gradients(SimpleNamespace(num_processes=2, sync_gradients=shared, reduce=reduce))
    assert next(iter(masters.parameters())).grad.item() == 6.0


def test_copies_survive_a_checkpoint_and_do_not_fit_another_model(tmp_path):
    model = layer()
    masters = Masters(model)
    updated(model, masters, 3, lr=1e-3)
    masters.save(tmp_path)
    again = layer()
    again.load_state_dict(model.state_dict())
    loaded = Masters(again)
    loaded.load(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(masters.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(CheckFailed, match="weight of the model is not its FP32 copy rounded"):
        Masters(layer()).load(tmp_path)


def test_float32_and_adapters_need_no_copies():
    assert Masters.of(nn.Linear(2, 2)) is None
    model = layer().requires_grad_(False)
    model.adapter = nn.Linear(2, 2)
    assert Masters.of(model) is None


@pytest.mark.parametrize("arm", ["w4a16", pytest.param("w4a16+aqn", marks=pytest.mark.slow)])
def test_a_run_in_bfloat16_learns_what_its_deployment_computes(arm, run, experiment, monkeypatch):
    """The quantizer, the sampler and the saved policy all hold the rounded copies; nothing else is there to hold."""
    held, real = [], Trainer._sample

    def sampled(self, problems):
        weights = dict(self.model.named_parameters())
        held.extend(
            (weights[name].dtype, torch.equal(weight, master.to(weight.dtype)) or arm == "w4a16+aqn")
            for name, (weight, master) in self.masters._pairs.items()
        )
        return real(self, problems)

    monkeypatch.setattr(Trainer, "_sample", sampled)
    described = experiment(arm, model={"dtype": "bfloat16"}, training={"lr": 3e-5})
    trained, heard = run(described)
    assert set(held) == {(torch.bfloat16, True)}
    assert [line["max_difference"] for line in heard.of("live_equals_fresh")] == [0.0]
    kept = load(trained.final, "float32")[0]  # as it stands in the file
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in kept.parameters())


@pytest.mark.parametrize(
    "model, training, said",
    [
        ({"master_dtype": "bfloat16"}, {}, "updates of about training.lr 1e-06 are below half a step of bfloat16 for"),
        ({"master_dtype": "bfloat16"}, {}, "every weight above 0.0005: hardly any weight will change; take model.mas"),
        ({}, {"steps": 10}, "20 updates of about training.lr 1e-06 together are below half a step of bfloat16 for"),
        ({}, {"steps": 100}, ""),
        ({"master_dtype": "bfloat16"}, {"lr": 1e-4}, ""),
        ({"master_dtype": "bfloat16", "lora": {}}, {}, ""),
    ],
)
def test_a_plan_says_where_hardly_any_weight_can_change(model, training, said):
    """Foreseen by hand: half a step of bfloat16 is 1/512 of a weight, so that 1e-6 moves weights up to 0.0005."""
    described = {"model": {"path": "models/real", "dtype": "bfloat16", **model}, "training": training}
    found = [line for line in Experiment.model_validate(described).warnings() if "half a step" in line]
    assert [said in line for line in found] == [True] * bool(said)
