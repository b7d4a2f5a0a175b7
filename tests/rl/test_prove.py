"""What a run proves of itself where chance acts in evaluation, and that what cannot be proved is not trained."""

import pytest

from fp4rl.inject.faults import SiteRng
from fp4rl.rl import trainer as trainer_room
from fp4rl.spec.errors import CheckFailed

EVERYWHERE = {"errors": ["rollout", "training", "evaluation"]}
RANDOM = {
    "stochastic input": {"weight": "mxfp4", "input": {"name": "mxfp4", "rounding": "stochastic"}},
    "stochastic cache": {"weight": "mxfp4", "kv_cache": {"name": "mxfp8", "rounding": "stochastic"}},
    "jitter": {"weight": "mxfp4", "errors": [{"kind": "jitter", "scale": 0.01}], "apply_during": EVERYWHERE},
}
SHORT = {"training": {"steps": 1}, "evaluation": {"count": 1, "profiles": ["full"]}}


@pytest.mark.parametrize("name", RANDOM)
def test_a_policy_with_chance_in_it_is_the_one_that_was_saved(name, run, experiment):
    trained, heard = run(experiment("bf16", injection=RANDOM[name], **SHORT))
    assert trained.evidence.live_equals_fresh
    assert heard.of("live_equals_fresh")[0]["max_difference"] == 0.0
    assert {row["phase"] for row in heard.of("injection") if "profile" not in row} == {"rollout", "training"}


def test_it_is_still_seen_when_another_policy_was_saved(run, experiment, monkeypatch):
    real = trainer_room.Trainer.train

    def then_written(self, *args, **kwargs):
        real(self, *args, **kwargs)
        save = self.model.save_pretrained

        def late(folder, **more):
            save(folder, **more)
            self.model.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)

        self.model.save_pretrained = late

    monkeypatch.setattr(trainer_room.Trainer, "train", then_written)
    with pytest.raises(CheckFailed, match="differ from those of its saved copy"):
        run(experiment("bf16", injection=RANDOM["jitter"], **SHORT))


def test_what_cannot_be_repeated_is_refused_before_anything_is_trained(run, experiment, monkeypatch):
    steps = []
    monkeypatch.setattr(SiteRng, "for_tensor", lambda self, x, salt: SiteRng.unknown(self, x.device, salt))
    monkeypatch.setattr(SiteRng, "fixed", SiteRng.for_tensor)
    monkeypatch.setattr(SiteRng, "unknown", lambda self, device, salt: (g := self._generator(device), g.seed())[0])
    monkeypatch.setattr(trainer_room.Trainer, "train", lambda *_, **__: steps.append(1))
    with pytest.raises(CheckFailed, match=r"before any training .* cannot be repeated"):
        run(experiment("bf16", injection=RANDOM["stochastic input"], **SHORT))
    assert not steps


def test_the_proof_before_training_moves_no_number_of_it(run, experiment, monkeypatch):
    def numbers(name):
        _, heard = run(experiment("bf16", injection=RANDOM["stochastic input"], **SHORT), name)
        return [{k: v for k, v in metrics.items() if not k.startswith("time/")} for _, metrics in heard.steps]

    proved = numbers("proved")
    monkeypatch.setattr("fp4rl.rl.train.require_verifiable", lambda *_: None)
    assert numbers("unproved") == proved
