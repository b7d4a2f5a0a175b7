"""The weights that are deployed: the average against torch's own, the best step by value, and both after a kill."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fp4rl.lab.matrix import single
from fp4rl.lab.work import execute_run
from fp4rl.rl import run as run_room
from fp4rl.rl import session as session_room
from fp4rl.rl.deployed import Deployed
from fp4rl.rl.evaluate import evaluate, items_digest
from fp4rl.rl.masters import Masters
from fp4rl.rl.trainer import Trainer
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import parse
from fp4rl.spec.training import Training

DECAY = 0.7
EMA = Training.model_validate({"ema": {"decay": DECAY}})


class Killed(BaseException):
    """Like a kill: nothing catches it."""


def stepped(module, parameters, number):
    random = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=random) * 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_torchs_own_of_the_masters_bit_for_bit(dtype):
    torch.manual_seed(0)
    model = nn.Linear(7, 5).to(dtype)
    masters, dropped = Masters.of(model), []
    exact = nn.Linear(7, 5)
    exact.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    theirs = AveragedModel(exact, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    ours = Deployed(model, masters, EMA, lambda: dropped.append(1))
    for number in range(9):
        stepped(exact, exact.parameters(), number)
        stepped(model, masters.parameters() if masters else model.parameters(), number)
        if masters:
            masters.write()
        theirs.update_parameters(exact)
        ours.update()
    live = {name: weight.clone() for name, weight in model.state_dict().items()}
    with ours.policy():
        for name, mean in theirs.module.state_dict().items():
            assert torch.equal(model.state_dict()[name], mean.to(dtype))
            assert not torch.equal(model.state_dict()[name], live[name])
        assert dropped == [1]
    assert all(torch.equal(weight, live[name]) for name, weight in model.state_dict().items())
    assert dropped == [1, 1]


@pytest.fixture
def carried(experiment, model_cache, tmp_path, monkeypatch):
    """`carried(name, stop_at=None, arm=..., **changes)` -> the folder after a run that may be killed first."""

    def go(name, stop_at=None, arm="w4a4", **changes):
        torch.set_num_threads(1)
        (tmp_path / name).mkdir(exist_ok=True)
        if not (tmp_path / name / "models").exists():
            (tmp_path / name / "models").symlink_to(model_cache)
        run, sample = single(experiment(arm, **changes), "trial"), Trainer._sample

        def killed(self, problems):
            if self.step == stop_at:
                raise Killed
            return sample(self, problems)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_sample", killed)
            try:
                return execute_run(run, tmp_path / name)
            except Killed:
                return None

    return go


TRAINED = {"training": {"steps": 3, "save_freq": 1, "lr": 2e-3}}
AVERAGED = {"training": {**TRAINED["training"], "ema": {"decay": DECAY}}}
CLAMPED = {"learned_clipping": {"init": 1.0, "lr": 0.1}}


def saved(folder):
    return load_file(folder.path / "final/model.safetensors")


def learned(folder):
    return {
        step: {name: value for name, value in values.items() if not name.startswith("time/")}
        for step, values in folder.metrics().items()
    }


@pytest.mark.parametrize("more", [{}, CLAMPED])
def test_what_is_saved_is_the_average_and_training_is_as_without(carried, monkeypatch, more):
    """Of clamped weights it is the average of what the model holds, which is clamped."""
    averages, real = [], session_room.TrainingSession.on_update

    def followed(self):
        if not averages:
            averages.append(AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY)))
        averages[0].update_parameters(self.model)
        return real(self)

    plain = carried("plain", training=TRAINED["training"] | more)
    monkeypatch.setattr(session_room.TrainingSession, "on_update", followed)
    folder = carried("averaged", training=AVERAGED["training"] | more)
    expected, stored = averages[0].module.state_dict(), saved(folder)
    assert stored
    assert all(torch.equal(weight, expected[name]) for name, weight in stored.items())
    assert not any(torch.equal(weight, saved(plain)[name]) for name, weight in stored.items())
    assert learned(folder) == learned(plain)
    assert folder.result().evidence.deployed.as_json() == {"step": 3, "ema_decay": DECAY}
    assert plain.result().evidence.deployed is None


HELD = {
    "oscillation": {"dampen": 0.01, "freeze": 0.5, "decay": 0.5},
    "betas": [0.0, 0.9],
    "mini_batch_size": 2,
    "lr": 0.01,
}


def test_a_killed_run_whose_average_rounds_goes_on_with_the_same_codes(carried):
    changes = {"training": {**AVERAGED["training"], "lr": 0.01, "ema": {"decay": DECAY, "rounds": True}}}
    whole = carried("whole", **changes)
    usual = carried("usual", training={**changes["training"], "ema": {"decay": DECAY}})
    assert carried("broken", 2, **changes) is None
    broken = carried("broken", **changes)
    for one, other in zip(*(f.result().evidence for f in (whole, broken)), strict=True):
        assert one == other
    assert learned(whole) == learned(broken)
    assert learned(whole)[1] == learned(usual)[1]  # the average begins as the weights
    assert learned(whole)[3] != learned(usual)[3]
    assert 0 < whole.result().evidence.deployed.codes_unlike < 0.2
    assert usual.result().evidence.deployed.codes_unlike is None


@pytest.mark.parametrize(("stop_at", "more"), [(1, {}), (2, HELD), (1, CLAMPED)])
def test_a_killed_run_ends_with_the_same_average_and_the_same_best(carried, stop_at, more):
    changes = {"training": {**AVERAGED["training"], "deployed": "best", **more}, "evaluation": {"test_freq": 1}}
    whole = carried("whole", **changes)
    assert carried("broken", stop_at, **changes) is None
    broken = carried("broken", **changes)
    assert "resumed from the checkpoint after step" in (broken.path / "log.txt").read_text()
    for one, other in zip(*(f.result().evidence for f in (whole, broken)), strict=True):
        assert one == other
    assert learned(whole) == learned(broken)
    if more == CLAMPED:
        bounds = [learned(whole)[step]["weights/clip_bound"] for step in (1, 2, 3)]
        assert len({*bounds}) == 3
        layers = [line for line in whole.evidence() if line.kind == "clipping"]
        assert layers == [line for line in broken.evidence() if line.kind == "clipping"]
        assert [line.layer for line in layers] == [0, 1]
    if more == HELD:
        last = learned(whole)[3]
        assert 0 < last["weights/frozen"] < last["weights/oscillating"] < 1
        layers = [line for line in whole.evidence() if line.kind == "oscillation"]
        assert layers == [line for line in broken.evidence() if line.kind == "oscillation"]
        assert [line.layer for line in layers] == [0, 1]
        assert all(0 < line.code_flips < 1 for line in layers)


def test_the_best_step_is_deployed_and_recorded(carried, monkeypatch):
    scores, seen = {1: 0.2, 2: 0.9, 3: 0.9}, {}

    def choice(self, folder, step):
        seen[step] = load_file(folder / "model.safetensors")
        return scores[step]

    monkeypatch.setattr(run_room.Run, "choice", choice)
    changes = {"training": {**TRAINED["training"], "deployed": "best"}, "evaluation": {"test_freq": 1}}
    folder = carried("best", **changes)
    stored = saved(folder)
    assert all(torch.equal(weight, seen[2][name]) for name, weight in stored.items())
    assert not any(torch.equal(weight, seen[3][name]) for name, weight in stored.items())
    deployed = folder.result().evidence.deployed
    assert (deployed.step, deployed.score, deployed.profile) == (2, 0.9, "deployment")
    assert [folder.metrics()[step]["accuracy/choice"] for step in (1, 2, 3)] == [0.2, 0.9, 0.9]
    assert (
        "deployed: the policy after step 2, the best on 24 validation problems" in (folder.path / "log.txt").read_text()
    )


def test_the_choice_is_made_on_the_validation_split_and_never_on_the_test_split(carried, experiment):
    changes = {"training": {**TRAINED["training"], "deployed": "best"}, "evaluation": {"test_freq": 2}}
    folder = carried("real", **changes)
    deployed, described = folder.result().evidence.deployed, experiment("w4a4", **changes)
    spec = described.evaluation.model_copy(update={"split": "validation", "profiles": ("deployment",)})
    (again,) = evaluate(folder.path / "final", described.model_copy(update={"evaluation": spec}))
    assert deployed.score == again.share("strict")
    assert set(folder.metrics()) == {1, 2, 3}
    assert {step for step, values in folder.metrics().items() if "accuracy/choice" in values} == {2, 3}
    assert deployed.problems == items_digest(described.task.problems("validation", spec.count))
    assert deployed.problems not in {e.profile.items_digest for e in folder.result().evaluations}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"training": {"ema": {"decay": 1.0}}}, "training.ema.decay"),
        ({"training": {"ema": {}}}, "training.ema.decay: this key is required"),
        ({"training": {"deployed": "best"}}, "test_freq steps, which is 0"),
        ({"training": {"deployed": "best", "steps": 3}, "evaluation": {"test_freq": 4}}, "write 1 to 3"),
        (
            {"training": {"deployed": "best"}, "evaluation": {"test_freq": 1, "split": "validation"}},
            "what chose cannot judge",
        ),
        ({"training": {"ema": {"decay": 0.9}}, "processes": 2, "sharding": "fsdp2"}, "training.ema keeps whole"),
    ],
)
def test_what_cannot_be_deployed_is_refused_by_name(content, why):
    with pytest.raises(InvalidValueError, match=why):
        parse(Experiment, content, "")
