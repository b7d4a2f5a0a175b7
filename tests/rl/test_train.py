"""A run as a whole: what it proves of itself, and that each of its checks catches the defect it is for."""

import contextlib
import math

import pytest
import torch

from fp4rl.inject.attach import attach
from fp4rl.inject.cache import QuantCache
from fp4rl.inject.evidence import master_digest
from fp4rl.models.load import load
from fp4rl.noise import perturb as perturb_room
from fp4rl.rl import phases as phases_room
from fp4rl.rl import trainer as trainer_room
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.task import Score

EVERY_ARM = ("bf16", "w4a16", "w4a16+aqn", "w4a4")


@pytest.mark.parametrize("arm", EVERY_ARM)
def test_after_training_live_logits_equal_those_of_a_freshly_loaded_copy(arm, run, experiment, monkeypatch):
    """With the trainer's own optimizer. The live model is caught inside `train`, before its own check of this."""
    live = {}
    real = trainer_room.Trainer.train

    def caught(self, *args, **kwargs):
        result = real(self, *args, **kwargs)
        ids = torch.arange(1, 40, device=self.model.device).unsqueeze(0)
        self.model.eval()
        if self.parts.phases.attachment is not None:
            self.parts.phases.attachment.set_phase("evaluation")
        live["optimizer"] = type(self.optimizer.optimizer).__name__
        live["fused"] = self.optimizer.param_groups[0].get("fused")
        with torch.no_grad():
            live["logits"] = self.model(input_ids=ids).logits.cpu()
        return result

    monkeypatch.setattr(trainer_room.Trainer, "train", caught)
    described = experiment(arm)
    trained, _ = run(described)
    fresh, _ = load(trained.final, "float32")
    injected = attach(fresh, described.injection) if described.injection else contextlib.nullcontext()
    with injected as attachment, torch.no_grad():
        if attachment is not None:
            attachment.set_phase("evaluation")
        logits = fresh(input_ids=torch.arange(1, 40).unsqueeze(0)).logits
    assert (live["optimizer"], live["fused"]) == ("AdamW", True)
    assert torch.equal(live["logits"], logits)


def test_a_stale_rounded_weight_fails_the_run(run, experiment, monkeypatch):
    monkeypatch.setattr(QuantCache, "forget", lambda self: None)
    monkeypatch.setattr(QuantCache, "get", lambda self, *weights: self.copy)
    with pytest.raises(CheckFailed, match="stale"):
        run(experiment("w4a16", training={"lr": 1e-2}))


def test_noise_is_realised_in_every_rollout_and_recorded(run, experiment):
    _, heard = run(experiment("w4a16+aqn"))
    noise = heard.of("noise")
    assert [record["step"] for record in noise] == [0, 1]
    assert all(record["sigma"] == 0.05 and record["share_changed"] > 0.9 for record in noise)
    assert [metrics["noise/sigma"] for _, metrics in heard.steps] == [0.05, 0.05]


def test_noise_that_changes_nothing_fails_the_run(run, experiment, monkeypatch):
    monkeypatch.setattr(perturb_room, "standard_noise", lambda seed, name, shape: torch.zeros(shape))
    with pytest.raises(CheckFailed, match="no weight was given any"):
        run(experiment("w4a16+aqn"))


def test_noise_that_is_not_taken_back_fails_the_run(run, experiment, monkeypatch):
    real = phases_room.perturb

    @contextlib.contextmanager
    def lasting(model, noise, sigma, **words):
        with real(model, noise, sigma, **words) as evidence:
            yield evidence
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "layernorm" in n).add_(1e-6)

    monkeypatch.setattr(phases_room, "perturb", lasting)
    with pytest.raises(CheckFailed, match="master weights are not the same after rollout"):
        run(experiment("w4a16+aqn"))


def test_step_0_and_the_last_step_are_judged_under_every_profile(run, experiment):
    trained, heard = run(experiment("w4a4"))
    seen = [(e.step, e.last, e.profile.name, e.profile.precision) for e in heard.evaluations]
    assert seen == [
        (0, False, "full", "full"),
        (0, False, "deployment", "w4a4"),
        (2, True, "full", "full"),
        (2, True, "deployment", "w4a4"),
    ]
    assert all(len(e.items) == 24 and e.profile.noise == "off" for e in heard.evaluations)
    assert len({e.profile.items_digest for e in heard.evaluations}) == 1
    assert trained.steps_done == 2


def test_injected_layers_are_called_in_rollout_and_training(run, experiment):
    trained, heard = run(experiment("w4a16"))
    rows = heard.of("injection")
    assert {row["phase"] for row in rows} >= {"rollout", "training"}
    assert all(row["calls"] > 0 for row in rows if row["phase"] in ("rollout", "training"))
    assert trained.evidence.sites == 14


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run, experiment):
    def numbers(heard):
        return [{k: v for k, v in metrics.items() if not k.startswith("time/")} for _, metrics in heard.steps]

    first, second = numbers(run(experiment("w4a4"), "a")[1]), numbers(run(experiment("w4a4"), "b")[1])
    assert first == second
    assert first != numbers(run(experiment("w4a4", seed=1), "c")[1])


def test_a_run_without_spread_learns_nothing_says_so_and_is_not_done(
    run, heard, experiment, start_folder, tmp_path, monkeypatch
):
    """Momentum would move the weights even under a zero gradient, so there must be no gradient at all."""
    monkeypatch.setattr(
        "fp4rl.tasks.arithmetic.Arithmetic.score", lambda self, problem, text: Score(False, False, False)
    )
    monkeypatch.setattr("fp4rl.rl.fill.soft_overlong_penalty", lambda lengths, *_: torch.zeros(len(lengths)))
    filtered = {"filter_groups": {"enable": True, "max_num_gen_batches": 2}}
    with pytest.raises(CheckFailed, match="none of the weights: no step had a group of answers with spread in score"):
        run(experiment("bf16", training=filtered), heard=heard)
    assert master_digest(load(tmp_path / "run" / "final")[0]) == master_digest(load(start_folder)[0])
    assert any("before any training: none of the" in line for line in heard.lines)
    said = [line for line in heard.lines if "dynamic sampling" in line]
    assert len(said) == 2
    assert all("no update in this step" in line for line in said)
    assert all(metrics["sampling/dropped_share"] == 1.0 and metrics["grad_norm"] == 0.0 for _, metrics in heard.steps)


def test_a_profile_that_is_no_precision_is_refused_before_anything_is_trained(experiment):
    with pytest.raises(ValueError, match="no profile is called 'w4a17'; did you mean 'w4a16'"):
        experiment(evaluation={"profiles": ["full", "w4a17"]})


def test_evaluations_on_the_way_stand_in_the_metrics_and_leave_no_folder(run, experiment):
    described = experiment("w4a16", evaluation={"test_freq": 1})
    trained, heard = run(described)
    assert [(e.step, e.last) for e in heard.evaluations] == [(0, False)] * 2 + [(1, False)] * 2 + [(2, True)] * 2
    (judged,) = [e for e in heard.evaluations if e.step == 1 and e.profile.name == "deployment"]
    assert heard.steps[0][1]["accuracy/validation"] == judged.share("strict")
    assert "accuracy/validation" not in heard.steps[1][1]
    assert not (trained.final.parent / "on-the-way").exists()
    assert trained.steps_done == 2


def test_an_evaluation_on_the_way_changes_no_number_of_the_training(run, experiment):
    def numbers(heard):
        own = ("time/", "accuracy/validation")
        return [{k: v for k, v in metrics.items() if not k.startswith(own)} for _, metrics in heard.steps]

    _, without = run(experiment("w4a4"), "a")
    _, among = run(experiment("w4a4", evaluation={"test_freq": 1, "samples": 2}), "b")
    assert numbers(without) == numbers(among)


def test_an_epoch_aware_schedule_begins_its_second_epoch_when_the_data_begin_anew(run, experiment):
    """Eight problems, four a step: the data are used up after two steps where the schedule had planned three."""
    schedule = {"kind": "epoch_aware", "epochs": 2, "stages_per_epoch": 2}
    task = {"name": "arithmetic", "difficulty": 1, "train_count": 8}
    training = {"steps": 6, "rollout_n": 2, "max_response_length": 12, "overlong_buffer": {"len": 4}}
    _, heard = run(experiment(task=task, training=training, noise={"schedule": schedule}))
    sigmas = [record["sigma"] for record in heard.of("noise")]
    # Slots of one step, then of 4 / 3 steps.
    assert sigmas == pytest.approx([0, 0.05, 0, 0, 0.005, 0.0005])
    (stages,) = heard.of("noise_stages")
    assert not stages["missed"]


@pytest.mark.parametrize("kind, after", [("cosine", 0.5), ("constant_with_warmup", 1.0)])
def test_the_learning_rate_warms_up_and_follows_its_schedule_in_steps(kind, after, run, experiment):
    """Two updates a step: a warm-up of two steps takes four of them. Logged is what the updates had, their mean."""
    recipe = {"steps": 4, "lr": 1e-3, "lr_scheduler": kind, "lr_warmup_steps": 2}
    _, heard = run(experiment("bf16", training=recipe, evaluation={"count": 1, "profiles": ["full"]}))
    rates = [metrics["lr"] for _, metrics in heard.steps]
    assert rates[:2] == pytest.approx([(0 + 0.25e-3) / 2, (0.5e-3 + 0.75e-3) / 2])
    halves = [0.5 * (1 + math.cos(math.pi * done / 4)) if after < 1 else 1.0 for done in range(4)]
    assert rates[2:] == pytest.approx([1e-3 * sum(halves[:2]) / 2, 1e-3 * sum(halves[2:]) / 2])
