"""The optimizer of a recipe: what reaches torch, what it moves, and what is refused by the name of its package."""

import pytest
import torch

from fp4rl.rl.check import check
from fp4rl.rl.components import arguments, require_optimizer
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import parse
from fp4rl.spec.training import OPTIMIZERS_OF, Training


def test_an_optimizer_of_a_package_that_is_not_here_is_refused_before_anything_runs(monkeypatch, experiment):
    monkeypatch.setattr("fp4rl.rl.components.find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(NotFoundError, match="adamw_8bit is of bitsandbytes, which is not installed: pip install"):
        check(experiment("bf16", training={"optimizer": "adamw_8bit"}))
    require_optimizer("adamw_torch_8bit")
    require_optimizer("adamw")


def test_every_name_is_one_of_transformers(tmp_path):
    from transformers.training_args import OptimizerNames

    known = {each.value for each in OptimizerNames}
    assert set(OPTIMIZERS_OF) <= known
    default = arguments(Training(), tmp_path, 0)
    assert "optim" not in default
    assert (default["adam_beta1"], default["adam_beta2"]) == (0.9, 0.999)
    given = arguments(Training(optimizer="adamw_torch", betas=(0.8, 0.95)), tmp_path, 0)
    assert (given["optim"], given["adam_beta1"], given["adam_beta2"]) == ("adamw_torch", 0.8, 0.95)


@pytest.mark.parametrize(
    "training, said",
    [({"betas": [0.9, 1.0]}, "less than 1"), ({"optimizer": "lion"}, "adamw"), ({"save_total_limit": 0}, "greater")],
)
def test_wrong_values_are_refused(training, said):
    with pytest.raises(InvalidValueError, match=said):
        parse(Experiment, {"training": training}, "")


def test_the_keys_leave_the_ids_of_earlier_runs():
    assert not {"optimizer", "betas", "save_total_limit"} & set(Training().model_dump())


def test_the_means_of_adamw_move_as_betas_say(run, experiment, monkeypatch):
    """The optimizer that torch steps has them; the warm-up of the embedded model before it has its own."""
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append([group["betas"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(experiment("bf16", training={"optimizer": "adamw_torch", "betas": [0.7, 0.9], "steps": 1}))
    assert set(seen[-1]) == {(0.7, 0.9)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_eight_bit_states_train(run, experiment):
    pytest.importorskip("torchao")
    trained, heard = run(experiment("bf16", training={"optimizer": "adamw_torch_8bit", "steps": 2}))
    assert trained.evidence.weights_changed > 0.5
    assert len(heard.steps) == 2


@pytest.mark.parametrize(
    "every, limit, kept", [(2, 2, [4, 6]), (2, 1, [6]), (3, 2, [3, 6]), (2, 9, [2, 4, 6]), (0, 2, [])]
)
def test_a_finished_run_keeps_as_many_checkpoints_as_it_says(every, limit, kept, tmp_path):
    from fp4rl.lab.folders import RunFolder
    from fp4rl.lab.work import _forget_interruptions
    from fp4rl.rl.checkpoints import STATE

    for step in range(1, 8):
        checkpoint = tmp_path / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / STATE).write_text(f'{{"stamp": "code", "step": {step}}}')
    _forget_interruptions(RunFolder(tmp_path), Training(save_freq=every, save_total_limit=limit))
    left = sorted(int(path.name.rpartition("-")[2]) for path in (tmp_path / "checkpoints").glob("*"))
    assert left == kept
