"""The audit of an engine: a sound one passes, every planted difference is found by the check that its cause names."""

import json
from pathlib import Path

import pytest
import torch

from fp4rl.cli.main import main
from fp4rl.engines.parity.audit import Engine, audit
from fp4rl.engines.parity.causes import CAUSES
from fp4rl.engines.parity.engines import engine_named
from fp4rl.models.load import load
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.generate import transformers_sampler
from fp4rl.rl.stream import injected_states
from fp4rl.spec.errors import CheckFailed, NotFoundError
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded

DOCS = Path(__file__).parents[2] / "docs" / "concepts" / "parity.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("parity"), build_tokenizer()
    torch.manual_seed(0)
    model = build(Embedded(), tokenizer)
    for weight in (p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name):
        torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def audited(folder, injection, sampler=transformers_sampler, held=None, deployment=None):
    model, tokenizer = load(folder)
    prompts = [tokenizer(f"{a} + {b} = ")["input_ids"] for a in (2, 13) for b in (3, 7, 25)]
    engine = Engine("planted", sampler, held or engine_named("transformers").held)
    checks = audit(engine, model, tokenizer, injection, prompts, 12, deployment)
    return {check.name: check for check in checks}


@pytest.mark.parametrize("mode", ["w4a16", "w4a8", "w4a4", "nvfp4_w4a4", None])
def test_the_trainers_own_model_is_at_parity(mode, folder):
    checks = audited(folder, Injection.named(mode) if mode else None)
    assert {name: check.passed for name, check in checks.items()} == dict.fromkeys(("weights", "scores", "order"), True)
    assert checks["scores"].numbers["max"] < 1e-3
    assert checks["scores"].numbers["tokens"] > 20


def test_what_the_rules_of_a_deployment_would_change_is_told(folder):
    own = audited(folder, Injection.named("w4a4", "compressed_tensors"), deployment="compressed_tensors")["rules"]
    other = audited(folder, Injection.named("w4a4", "compressed_tensors"), deployment="vllm_blackwell")["rules"]
    assert own.passed is other.passed is None
    assert own.numbers["max"] < 1e-6 < 1e-2 < other.numbers["max"]


def unrounded(model, tokenizer, prompts, sampling):
    """An engine whose inputs and weights stay in full precision."""
    states = injected_states(model)
    for state in states:
        state.enter("reference", frozenset())
    answers = transformers_sampler(model, tokenizer, prompts, sampling)
    for state in states:
        state.enter("rollout", frozenset({"weight", "input"}))
        state.calls += 1
        for point in ("weight", "input"):
            state.meter(point).elements += 1  # it even says that it rounded
    return answers


def shifted(model, tokenizer, prompts, sampling):
    """An engine that drops the first token of a prompt, as one does whose positions are off."""
    return transformers_sampler(model, tokenizer, [prompt[1:] for prompt in prompts], sampling)


def without_numbers(model, tokenizer, prompts, sampling):
    return [a._replace(logps=None) for a in transformers_sampler(model, tokenizer, prompts, sampling)]


@pytest.mark.parametrize("sampler", [unrounded, shifted])
def test_a_sampler_that_is_another_policy_differs_in_its_scores(sampler, folder):
    checks = audited(folder, Injection.named("w4a4"), sampler)
    assert checks["scores"].passed is False
    assert checks["scores"].numbers["k3"] > 2e-3


def test_an_engine_without_log_probabilities_does_not_pass(folder):
    check = audited(folder, Injection.named("w4a4"), without_numbers)["scores"]
    assert (check.passed, check.seen) == (False, "the engine gave no log-probability")


def test_one_factor_for_a_call_differs_in_its_order(folder):
    checks = audited(folder, Injection.model_validate({"weight": "nvfp4", "input": "nvfp4"}))
    assert checks["order"].passed is False
    assert checks["order"].numbers["alone_max"] > 1e-2


def test_other_weights_differ_whatever_their_names(folder):
    def held(model, attachment):
        """A copy that went stale: made before the master was written in a way that nothing tells."""
        name, state = next(iter(attachment.states.items()))
        layer = model.get_submodule(name)
        kept = layer.weight.detach().clone()
        layer.weight.data.mul_(-1)
        state.cache.put(*stale(state, layer, kept))
        try:
            return engine_named("transformers").held(model, attachment)
        finally:
            layer.weight.data.copy_(kept)

    def stale(state, layer, kept):
        with torch.no_grad():
            copy, reach = state._make(kept)
        return copy, reach, layer.weight

    checks = audited(folder, Injection.named("w4a16"), held=held)
    assert checks["weights"].passed is False
    assert "q_proj" in checks["weights"].seen


def test_a_silent_engine_is_no_engine(folder):
    with pytest.raises(CheckFailed, match="nothing was injected there"):
        audited(folder, Injection.named("w4a4"), lambda *_: [])


def test_causes_stand_in_the_documentation_with_their_cure():
    page = DOCS.read_text()
    for cause in CAUSES:
        assert f"| {cause.what} | {cause.shows} | {cause.mended} |" in page
    assert {cause.check for cause in CAUSES} == {"weights", "scores", "rules", "order"}


# -- the command


def test_a_model_folder_is_audited_from_the_command_line(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = ["parity", str(folder), "--mode", "w4a4", "--count", "4", "--max-new-tokens", "6"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("equal ") == 3
    assert all(len(line) <= 80 for line in said.splitlines())
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [check["passed"] for check in answer["checks"]] == [True] * 3


def test_a_difference_ends_with_one_and_names_its_causes(folder, capsys, monkeypatch):
    monkeypatch.setattr("fp4rl.engines.parity.engines.sampler_named", lambda _: shifted)
    assert main(["parity", str(folder), "--mode", "w4a4", "--count", "4", "--max-new-tokens", "6"]) == 1
    said = capsys.readouterr()
    assert "cause: positions, padding or the mask" in said.out
    assert "transformers is another policy than the one that is trained: scores differ" in said.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["no-such-run"], "is no model folder and no run below"),
        (["{folder}", "--engine", "vlm"], "there is no such engine; did you mean 'vllm'"),
        (["{folder}", "a=b"], "is no spec file"),
        (["{folder}", "--mode", "w4a5"], "no mode is called 'w4a5'"),
    ],
)
def test_wrong_words_are_one_line(words, line, folder, capsys):
    assert main(["parity", *(word.format(folder=folder) for word in words)]) == 2
    assert line in capsys.readouterr().err


def test_an_engine_that_is_not_installed_says_so():
    with pytest.raises(NotFoundError, match="vLLM is not installed here"):
        engine_named("vllm")
