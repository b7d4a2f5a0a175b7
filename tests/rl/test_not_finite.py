"""A NaN is the failure of a run and never a number, although greedy decoding makes a token out of it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import single
from fp4rl.lab.work import execute_run
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl import trainer as trainer_room
from fp4rl.rl.generate import Sampling, answer_logps, transformers_sampler
from fp4rl.spec.errors import CheckFailed, NotFinite, require_finite
from fp4rl.spec.evidence import Injected

HEAD = "model.layers.1.self_attn.v_proj"
NAMED = f"hold NaN or infinity; first out of {HEAD}, whose weight holds it"


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=32, pad_token_id=0, **shape)).eval()


def poison(model, value=float("nan")):
    with torch.no_grad():
        model.get_submodule(HEAD).weight[8:, 3] = value  # the second of two heads


def generated(model, **sampling):
    return transformers_sampler(model, build_tokenizer(), [[5, 6, 7], [8]], Sampling(4, **sampling))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "count": 2, "logps": True}])
def test_no_token_is_drawn_from_what_is_no_logit(model, sampling, value):
    assert len(generated(model, **sampling)) == 2 * sampling.get("count", 1)
    poison(model, value)
    with pytest.raises(NotFinite, match=f"logits {NAMED}"):
        generated(model, **sampling)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_that_a_model_rules_out_are_no_fault(model, temperature):
    def rule_out(_module, _args, output):
        return output.index_fill(-1, torch.arange(0, 64, 2), -torch.inf)

    model.lm_head.register_forward_hook(rule_out)
    assert all(token % 2 for answer in generated(model, temperature=temperature) for token in answer.tokens)


def test_what_breaks_while_decoding_is_found_as_well(model):
    """The first logits are sound: position 5 alone is broken."""

    def broken(_module, args, kwargs, output):
        return output.masked_fill((kwargs["position_ids"] == 5).unsqueeze(-1), torch.nan) if kwargs else output

    layer = model.model.layers[2]
    layer.register_forward_hook(broken, with_kwargs=True)
    with pytest.raises(NotFinite, match=r"logits hold NaN or infinity; first out of model.layers.2$"):
        generated(model)


def test_no_answer_is_scored_by_a_nan(model):
    add_fused_lm_head(model, temperature=1.0)
    ids, mask = torch.randint(3, 64, (2, 3)), torch.ones(2, 3, dtype=torch.long)
    batch = {
        f"{part}_{what}": value for part in ("prompt", "completion") for what, value in (("ids", ids), ("mask", mask))
    }
    assert answer_logps(model, batch, rows=1)[0].isfinite().all()
    poison(model)
    with pytest.raises(NotFinite, match=f"log-probabilities of answers {NAMED}"):
        answer_logps(model, batch, rows=1)


def test_the_broken_number_is_named_however_deep_it_lies():
    line = Injected(phase="training", site="a", point="input", calls=1, elements=1, relative_error=float("nan"))
    with pytest.raises(NotFinite, match=r"^here: relative_error is nan$"):
        require_finite("here", line.as_json())
    with pytest.raises(NotFinite, match=r"^here: layers.1.sigma is -inf$"):
        require_finite("here", {"layers": [{"sigma": 0.0}, {"sigma": -float("inf")}], "n": 3, "word": "nan"})


@pytest.fixture
def broken_gradient(monkeypatch):
    """`broken_gradient(step, times)`: the loss of that step has a NaN for its gradient, so often."""

    def plant(step, times=1):
        left, real = [times], trainer_room.Trainer._compute_loss

        def compute(self, model, inputs):
            loss = real(self, model, inputs)
            if self.step + 1 == step and left[0]:
                left[0] -= 1
                loss = loss + 0 * (loss - loss.detach()).sqrt()  # the value stays, the gradient is 0 * inf
            return loss

        monkeypatch.setattr(trainer_room.Trainer, "_compute_loss", compute)

    return plant


KEPT = {"steps": 3, "save_freq": 1}


def test_a_gradient_that_is_none_fails_the_run_before_it_reaches_a_weight(
    broken_gradient, experiment, model_cache, tmp_path
):
    (tmp_path / "models").symlink_to(model_cache)
    broken_gradient(2)
    planned = single(experiment("w4a16", training=KEPT, evaluation={"profiles": ["deployment"]}), "trial")
    with pytest.raises(CheckFailed, match=r"^step 2: before the update: grad_norm is nan$"):
        execute_run(planned, tmp_path)
    folder = run_folder(tmp_path, planned.suite, planned.run_id)
    assert not folder.finished
    assert folder.failure == "step 2: before the update: grad_norm is nan"
    assert list(folder.metrics()) == [1]
    execute_run(planned, tmp_path)  # the same command goes on from the checkpoint, and the failure is forgotten
    assert folder.finished
    assert folder.failure is None
    assert "failed" not in {line.kind for line in folder.evidence()}


def test_a_monitor_that_is_to_roll_back_does(broken_gradient, run, experiment):
    broken_gradient(3)
    health = {"policies": {"not_a_number": "rollback"}}
    evaluation = {"count": 8, "profiles": ["deployment"]}
    trained, heard = run(experiment("w4a16", training=KEPT, health=health, evaluation=evaluation))
    assert [(r["step"], r["to"]) for r in heard.of("rollback")] == [(2, 2)]
    assert (trained.steps_done, trained.stopped) == (3, None)


def test_a_metric_that_is_none_fails_the_run(run, experiment, monkeypatch):
    real = trainer_room.compare_sampler
    monkeypatch.setattr(
        trainer_room, "compare_sampler", lambda *a: real(*a) | {"rollout_corr/decode_k3_kl": float("inf")}
    )
    with pytest.raises(NotFinite, match=r"^step 1: metrics: rollout_corr/decode_k3_kl is inf$"):
        run(experiment("w4a16"))
