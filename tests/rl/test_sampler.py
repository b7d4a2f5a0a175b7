"""A sampler is one entry; trainer and evaluator both ask the one that the experiment names."""

import pytest
import torch

from fp4rl.rl import generate
from fp4rl.rl.check import check
from fp4rl.rl.generate import Generation, transformers_sampler
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.former_names import in_present_words
from fp4rl.spec.load import former_words, load_spec
from fp4rl.spec.rollout import RolloutEngine


class Parrot:
    """Says one answer to everything; of half of its tokens it cannot tell the log-probability."""

    def __init__(self):
        self.asked = []

    def __call__(self, model, tokenizer, prompts, sampling):  # noqa: ARG002
        self.asked.append((len(prompts), sampling))
        tokens = [*tokenizer("1 + 1 = 2\n#### 2")["input_ids"], tokenizer.eos_token_id]
        logps = torch.full((len(tokens),), -1.0).index_fill(0, torch.arange(0, len(tokens), 2), torch.nan)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        return [Generation(tokens, text, True, logps)] * (len(prompts) * sampling.count)


@pytest.fixture
def plugged(monkeypatch):
    made = []

    def parrot(_):
        made.append(Parrot())
        return made[-1]

    monkeypatch.setitem(generate.SAMPLERS, "parrot", parrot)
    return made


def test_another_sampler_answers_rollouts_and_evaluations(plugged, run, experiment, monkeypatch):
    monkeypatch.setattr("fp4rl.rl.mismatch.require_decoded", lambda *_: None)  # a parrot is not the policy
    described = experiment("bf16", training={"steps": 1}).model_copy(update={"rollout": RolloutEngine(engine="parrot")})
    _, heard = run(described)
    asked = [call for sampler in plugged for call in sampler.asked]
    assert (16, True) in [(prompts, sampling.logps) for prompts, sampling in asked]
    assert sum(prompts for prompts, sampling in asked if not sampling.logps) == 4 * 24  # two profiles, start and end
    assert {item.completion for e in heard.evaluations for item in e.items} == {"1 + 1 = 2\n#### 2"}
    assert {e.profile.sampling for e in heard.evaluations} == {"greedy, by parrot"}


def test_a_sampler_nobody_knows_is_refused_before_a_run(experiment):
    with pytest.raises(NotFoundError, match=r"no rollout\.engine 'transformer'; did you mean 'transformers'"):
        check(experiment("bf16").model_copy(update={"rollout": RolloutEngine(engine="transformer")}))


def test_the_key_changes_no_digest_unless_it_is_set():
    plain = Experiment()
    assert "rollout" not in plain.model_dump()
    assert digest(plain) != digest(plain.model_copy(update={"rollout": RolloutEngine(engine="parrot")}))
    assert Experiment.model_validate({"rollout": "parrot"}).rollout.engine == "parrot"
    assert digest({"sampler": "vllm"}) == digest({"rollout": {"engine": "vllm"}})  # what it was called first


def test_the_former_key_is_read_as_the_engine_and_said_once(tmp_path):
    (tmp_path / "former.yaml").write_text("sampler: vllm\n")
    assert load_spec(tmp_path / "former.yaml").rollout == RolloutEngine(engine="vllm")
    assert former_words(tmp_path / "former.yaml", ["sampler=vllm"]) == ["sampler is now rollout.engine"]
    assert in_present_words({"base.sampler": "vllm", "axes": {"sampler": ["vllm"]}, "factors": ["sampler"]}) == {
        "base.rollout": {"engine": "vllm"},
        "axes": {"rollout.engine": ["vllm"]},
        "factors": ["rollout.engine"],
    }


def test_a_server_is_of_vllm_and_has_an_address():
    with pytest.raises(ValueError, match=r"rollout\.server is of engine vllm"):
        RolloutEngine(server="http://127.0.0.1:8000")
    with pytest.raises(ValueError, match="write processes: 1"):
        Experiment(rollout={"engine": "vllm", "server": "http://127.0.0.1:8000"}, processes=2)
    with pytest.raises(ValueError, match="server"):
        RolloutEngine(engine="vllm", server="127.0.0.1:8000")


def test_what_is_asked_for_is_what_comes(experiment, model_cache):
    from fp4rl.models.load import load
    from fp4rl.rl.inputs import start_folder

    described = experiment("bf16")
    model, tokenizer = load(start_folder(described.model, described.task, model_cache))
    prompts = tokenizer(["1 + 1 = ", "2"])["input_ids"]
    torch.manual_seed(0)
    found = transformers_sampler(model, tokenizer, prompts, generate.Sampling(6, 1.0, count=3, logps=True))
    assert len(found) == 6
    assert all(len(answer.logps) == len(answer.tokens) <= 6 for answer in found)
    assert transformers_sampler(model, tokenizer, prompts, generate.Sampling(6))[0].logps is None


def test_no_process_waits_for_another_while_it_samples(experiment, model_cache, monkeypatch):
    """Sharded models make transformers wait in every token: for ever, where processes sample unequally often."""
    from fp4rl.models.load import load
    from fp4rl.rl.inputs import start_folder

    described = experiment("bf16")
    model, tokenizer = load(start_folder(described.model, described.task, model_cache))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)
    monkeypatch.setattr("transformers.generation.utils.is_fsdp_managed_module", lambda _: True)
    waited = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: waited.append(True))
    transformers_sampler(model, tokenizer, tokenizer(["1 + 1 = "])["input_ids"], generate.Sampling(3))
    assert waited == []
