"""The audit of an engine: a sound one passes, every planted difference is found by the check that its cause names."""

import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fp4rl.cli.main import main
from fp4rl.engines.parity.audit import Engine, audit
from fp4rl.engines.parity.causes import CAUSES, causes_of
from fp4rl.engines.parity.engines import engine_of
from fp4rl.engines.parity.scores import in_float32
from fp4rl.inject.attach import attach
from fp4rl.inject.present import presents
from fp4rl.models.load import load
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.noise.perturb import perturb
from fp4rl.rl.generate import transformers_sampler
from fp4rl.rl.stream import injected_states
from fp4rl.spec.errors import EngineDiffers, NotFoundError
from fp4rl.spec.evidence import WeightsServed
from fp4rl.spec.formats import format_named
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded
from fp4rl.spec.noise import Noise
from fp4rl.spec.rollout import RolloutEngine

TRANSFORMERS = engine_of(RolloutEngine())
HELD = ("weights", "scores", "refresh", "order")
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


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    assert main(["export", str(folder), str(out), "--to", "compressed_tensors"]) == 0
    return out


def audited(folder, injection, sampler=transformers_sampler, held=None, deployment=None, dtype="float32"):
    model, tokenizer = load(folder, dtype=getattr(torch, dtype))
    prompts = [tokenizer(f"{a} + {b} = ")["input_ids"] for a in (2, 13) for b in (3, 7, 25)]
    engine = Engine("planted", sampler, held or TRANSFORMERS.held)
    checks = audit(engine, model, tokenizer, injection, prompts, 12, deployment)
    return {check.name: check for check in checks}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["w4a16", "w4a8", "w4a4", "nvfp4_w4a4", None])
def test_the_trainers_own_model_is_at_parity(mode, dtype, folder):
    checks = audited(folder, Injection.named(mode) if mode else None, dtype=dtype)
    assert {name: check.passed for name, check in checks.items()} == dict.fromkeys(HELD, True)
    assert checks["scores"].numbers["max"] < {"float32": 1e-3, "bfloat16": 0.2}[dtype]
    assert checks["scores"].numbers["tokens"] > 20
    assert ("float32_mean" in checks["scores"].numbers) is (dtype == "bfloat16")


def leaving_out(point, counting=True):
    """An engine that rounds all but one point, and says that it rounded this one too."""

    def sampler(model, tokenizer, prompts, sampling):
        states = injected_states(model)
        for state in states:
            state.enter("rollout", state.points - {point})
        answers = transformers_sampler(model, tokenizer, prompts, sampling)
        for state in states:
            state.enter("rollout", frozenset({"weight", "input", "kv_cache"}))
            state.meter(point).elements += counting
        return answers

    return sampler


def with_input(name):
    """An engine that rounds inputs to another format than was trained."""

    def sampler(model, tokenizer, prompts, sampling):
        kept = {state: state.present for state in injected_states(model)}
        for state in kept:
            state.present = presents(replace(state.plan, input=format_named(name)), state.injection, None)
            state.enter("rollout", state.points)
        answers = transformers_sampler(model, tokenizer, prompts, sampling)
        for state, present in kept.items():
            state.present = present
        return answers

    return sampler


def with_other_positions(model, tokenizer, prompts, sampling):
    """An engine whose rotary frequencies are of another base."""
    rotary = model.model.rotary_emb
    kept = rotary.inv_freq.clone()
    rotary.inv_freq.mul_(torch.linspace(1.0, 0.5, len(kept)))
    answers = transformers_sampler(model, tokenizer, prompts, sampling)
    rotary.inv_freq.copy_(kept)
    return answers


def almost_without_numbers(model, tokenizer, prompts, sampling):
    def first_alone(logps):
        return torch.where(torch.arange(len(logps)) == 0, logps, torch.nan)

    answers = transformers_sampler(model, tokenizer, prompts, sampling)
    return [answer._replace(logps=first_alone(answer.logps)) for answer in answers]


def rounding_by_itself(mode):
    """An engine that read a quantization from a folder, and rounds a policy that nobody asked it to round."""

    def sampler(model, tokenizer, prompts, sampling):
        with attach(model, Injection.named(mode)) as own:
            own.set_phase("rollout")
            return transformers_sampler(model, tokenizer, prompts, sampling)

    return sampler


@pytest.mark.parametrize("mode", ["w4a16", "w8a8"])
def test_an_engine_that_rounds_an_unquantized_policy_differs(mode, folder):
    """The fault that was made: the unrounded arm of a comparison was served in few bits, by auto-detection."""
    assert audited(folder, None)["scores"].passed
    check = audited(folder, None, rounding_by_itself(mode))["scores"]
    assert check.passed is False, check.seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("mode", "sampler"),
    [
        ("w4a8", leaving_out("input")),
        ("w4a4", leaving_out("input")),
        ("w4a8", with_input("mxfp8_e5m2")),
        ("w4a16", with_other_positions),
        (None, with_other_positions),
        (None, almost_without_numbers),
    ],
)
def test_what_damages_no_training_yet_differs_all_the_same(mode, sampler, dtype, folder):
    check = audited(folder, Injection.named(mode) if mode else None, sampler, dtype=dtype)["scores"]
    assert check.passed is False, check.seen
    assert check.numbers["k3"] < 3e-2


def cached(model, tokenizer, prompts, sampling, kept={}):  # noqa: B006 - it is a cache
    """An engine that answers a prompt anew with what it computed when it first saw it."""
    fresh = transformers_sampler(model, tokenizer, prompts, sampling)
    for prompt, answer in zip(prompts, fresh, strict=True):
        kept.setdefault((id(model), tuple(prompt), sampling.temperature), answer)
    return [kept[id(model), tuple(prompt), sampling.temperature] for prompt in prompts]


def test_an_engine_that_remembers_old_weights_differs_after_a_refresh(folder):
    checks = audited(folder, Injection.named("w4a8"), cached)
    assert {name: check.passed for name, check in checks.items()} == {**dict.fromkeys(HELD, True), "refresh": False}


def test_one_call_under_other_weights_differs_in_its_order(folder):
    calls = []

    def sampler(model, tokenizer, prompts, sampling):
        calls.append(sampling.temperature)
        if calls.count(0.0) != 2:
            return transformers_sampler(model, tokenizer, prompts, sampling)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.02)
        answers = transformers_sampler(model, tokenizer, prompts, sampling)
        with torch.no_grad():
            model.model.norm.weight.div_(1.02)
        return answers

    checks = audited(folder, None, sampler)
    assert {name: check.passed for name, check in checks.items()} == {**dict.fromkeys(HELD, True), "order": False}


def test_the_effect_of_a_point_that_is_left_out_is_told(folder):
    own = audited(folder, Injection.named("w4a8"))["scores"].numbers
    other = audited(folder, Injection.named("w4a8"), leaving_out("input"))["scores"].numbers
    assert own["input_missing"] == pytest.approx(0, abs=0.02)
    assert other["input_missing"] == pytest.approx(1, abs=0.02)
    assert other["input_missing_error"] < 0.02


def test_sixteen_bits_come_back_as_they_were(folder):
    model, _ = load(folder, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    with in_float32(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_what_is_drawn_is_judged_by_its_damage_alone(folder):
    described = {"mode": "w4a4", "errors": [{"kind": "relative", "scale": 1e-4}]}
    assert (
        "only k3 is judged: hardware errors are drawn"
        in audited(folder, Injection.model_validate(described))["scores"].seen
    )


def test_causes_are_those_of_the_tensors_that_differ():
    norms = causes_of("weights", ["model.layers.0.input_layernorm.weight", "model.norm.weight"])
    assert any("noise was put on twice" in cause.what for cause in norms)
    assert not any("two experts" in cause.what or "router" in cause.what for cause in norms)
    one = causes_of("weights", ["model.layers.0.mlp.experts.3.gate_proj.weight"])
    assert any("transposed" in cause.what for cause in one)
    assert not any("noise was" in cause.what or "tied" in cause.what for cause in one)
    assert len(causes_of("weights")) > len(norms)


def test_what_the_rules_of_a_deployment_would_change_is_told(folder):
    own = audited(folder, Injection.named("w4a4", "compressed_tensors"), deployment="compressed_tensors")["rules"]
    other = audited(folder, Injection.named("w4a4", "compressed_tensors"), deployment="vllm_blackwell")["rules"]
    assert own.passed is other.passed is None
    assert own.numbers["max"] < 1e-6 < 1e-2 < other.numbers["max"]


def test_a_rounded_cache_is_told_and_is_no_cause(folder):
    described = Injection.model_validate({"mode": "w4a16", "kv_cache": "mxfp4"})
    checks = audited(folder, described)
    assert {name: check.passed for name, check in checks.items()} == {
        "weights": True,
        "kv_cache": None,
        "scores": True,
        "refresh": True,
        "order": True,
    }
    seen, numbers = checks["kv_cache"].seen, checks["kv_cache"].numbers
    assert seen.startswith("2 sites rounded ")
    assert "of keys and values to mxfp4 while sampling" in seen
    assert numbers["sites"] == 2
    assert numbers["elements"] % 128 == 0 < numbers["elements"]  # two heads of 32, keys and values
    assert numbers["rollout_error"] == pytest.approx(numbers["training_error"], rel=0.2)
    assert 0.05 < numbers["training_error"] < 0.2
    for during, told in ((["training"], None), (["rollout"], "the trainer's pass by nothing")):
        other = described.model_dump(mode="json", exclude_defaults=True) | {"apply_during": {"kv_cache": during}}
        check = audited(folder, Injection.model_validate(other)).get("kv_cache")
        assert (check and told in check.seen) == (told and True)


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


def noise_twice(model, tokenizer, prompts, sampling):
    """An engine that puts the noise of its weights on once more."""
    with perturb(model, Noise(), 0.1, generator=torch.Generator().manual_seed(0)):
        return transformers_sampler(model, tokenizer, prompts, sampling)


def without_numbers(model, tokenizer, prompts, sampling):
    return [a._replace(logps=None) for a in transformers_sampler(model, tokenizer, prompts, sampling)]


@pytest.mark.parametrize("sampler", [unrounded, shifted, noise_twice])
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
            return TRANSFORMERS.held(model, attachment)
        finally:
            layer.weight.data.copy_(kept)

    def stale(state, layer, kept):
        with torch.no_grad():
            copy, reach = state._make(kept)
        return copy, reach, layer.weight

    checks = audited(folder, Injection.named("w4a16"), held=held)
    assert checks["weights"].passed is False
    assert "q_proj" in checks["weights"].seen


@pytest.mark.parametrize("declared", ["bfloat16", "float32"])
def test_an_engine_that_rounds_the_master_where_its_bf16_copy_is_declared_differs(declared, folder):
    """And the other way round: about one value of a hundred, a step of the grid apart."""
    rounded_as = {"bfloat16": torch.float32, "float32": torch.bfloat16}[declared]
    shares = []

    def casting_otherwise(model, tokenizer, prompts, sampling):
        for state in injected_states(model):
            layer = model.get_submodule(state.plan.name)
            right = state.rounded_weight(layer).detach().clone()
            state.cache.forget()
            state.dtype = rounded_as
            shares.append((state.rounded_weight(layer) != right).float().mean().item())
        return transformers_sampler(model, tokenizer, prompts, sampling)

    injection = Injection.named("w4a16").model_copy(update={"dtype": declared})
    checks = audited(folder, injection, casting_otherwise)
    assert checks["weights"].passed is False
    assert "at 14 of 14 sites" in checks["weights"].seen
    assert all(0.002 < share < 0.03 for share in shares[:14])


def test_a_silent_engine_is_no_engine(folder):
    checks = audited(folder, Injection.named("w4a4"), lambda *_: [])
    assert list(checks) == ["calls"]
    assert checks["calls"].passed is False
    assert "nothing was injected there" in checks["calls"].seen


def test_causes_stand_in_the_documentation_with_their_cure():
    page = DOCS.read_text()
    for cause in CAUSES:
        assert f"| {cause.what} | {cause.shows} | {cause.mended} |" in page
    assert {cause.check for cause in CAUSES} == {"calls", "weights", "versions", "scores", "refresh", "rules", "order"}


class Served:
    """An engine that serves weights under versions; `versions` are those of its calls."""

    def __init__(self, versions):
        self.lines = [WeightsServed(weight_version=version, tensors=1, compared=1) for version in versions]

    def __call__(self, *asked):
        return transformers_sampler(*asked)

    def evidence(self):
        return self.lines


def test_versions_are_told_of_an_engine_that_serves_them(folder):
    checks = audited(folder, None, Served([f"run-{number}" for number in range(1, 10)]))
    assert checks["versions"].passed is True
    assert checks["versions"].seen == "9 calls, answered with 9 versions of the weights: run-1 to run-9"


@pytest.mark.parametrize("versions", [["run-1"] * 9, [f"run-{number}" for number in range(8)]])
def test_calls_without_a_version_of_their_own_differ(versions, folder):
    assert audited(folder, None, Served(versions))["versions"].passed is False


def test_an_engine_that_finds_itself_another_policy_ends_the_audit_with_that_check(folder):
    def other(*_):
        raise EngineDiffers("answers of version b-7 where a-1 was sent", "versions")

    checks = audited(folder, Injection.named("w4a4"), other, deployment="vllm_ascend")
    assert list(checks) == ["versions"]
    assert (checks["versions"].passed, checks["versions"].seen) == (False, "answers of version b-7 where a-1 was sent")


def noted(into, *now):
    into.append(now)


def test_each_part_of_an_audit_is_told_as_progress(folder):
    model, tokenizer = load(folder)
    prompts = [tokenizer(f"{a} + 3 = ")["input_ids"] for a in (2, 13, 5)]
    for deployment, parts in ((None, 11), ("vllm_ascend", 12)):
        told = []
        injection = Injection.named("w4a16")
        asked = (TRANSFORMERS, model, tokenizer, injection, prompts, 2, deployment)
        list(audit(*asked, on_progress=partial(noted, told)))
        assert told == [(done, parts) for done in range(1, parts + 1)]


# -- the command


def test_a_model_folder_is_audited_from_the_command_line(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = ["parity", str(folder), "--mode", "w4a4", "--count", "4", "--max-new-tokens", "6"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("equal ") == 4
    assert all(len(line) <= 80 for line in said.splitlines())
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [check["passed"] for check in answer["checks"]] == [True] * 4


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
        (["{folder}", "--server", "http://127.0.0.1:9"], "rollout.server http://127.0.0.1:9 does not answer"),
        (
            ["{folder}", "--server", "127.0.0.1:9"],
            "--server: rollout.server '127.0.0.1:9' is no address; write http://HOST:PORT",
        ),
        (["{folder}", "--deployment", "nowhere"], "no deployment is called 'nowhere'"),
        (["{folder}", "--mode", "w4a4", "--deployment", "nowhere"], "no deployment is called 'nowhere'"),
        (["{folder}", "--deployment", "vllm_ascend"], "nothing is rounded, so its rules change nothing; add --mode"),
        (["{folder}", "--engine", "transformers", "--server", "http://127.0.0.1:9"], "engine transformers asks none"),
        (["{packed}", "--engine", "vllm"], "vLLM is not installed here"),
    ],
)
def test_wrong_words_are_one_line(words, line, folder, packed, capsys):
    assert main(["parity", *(word.format(folder=folder, packed=packed) for word in words)]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert len(said.splitlines()) == 1


def test_what_is_audited_of_a_packed_folder_is_said(packed, capsys, monkeypatch):
    words = ["parity", str(packed), "--mode", "w4a4", "--count", "2", "--max-new-tokens", "2"]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"{packed} is packed (compressed-tensors " in said
    assert "what is audited are the decoded values; `fp4rl verify` compares what the folder itself holds" in said
    monkeypatch.setattr("fp4rl.engines.parity.engines.sampler_named", lambda _: transformers_sampler)
    assert main([*words, "--engine", "vllm"]) == 2
    assert "`fp4rl verify FOLDER --engine vllm` compares the two" in " ".join(capsys.readouterr().err.split())


def test_the_embedded_model_is_a_model(tmp_path, capsys, monkeypatch):
    told = []

    def warmed(model, task, cache, on_warm_up):
        assert (model.embedded, cache) == (Embedded(), tmp_path / "models")
        on_warm_up(1, 0.5)
        path = tmp_path / "made"
        torch.manual_seed(0)
        build(Embedded(), build_tokenizer()).save_pretrained(path)
        build_tokenizer().save_pretrained(path)
        return path

    @contextmanager
    def bar():
        yield lambda *now: told.append(now)

    monkeypatch.setattr("fp4rl.rl.inputs.start_folder", warmed)
    monkeypatch.setattr("fp4rl.cli.packed_start.progress", bar)
    words = ["--mode", "w4a4", "--count", "2", "--max-new-tokens", "2", "--runs", str(tmp_path)]
    assert main(["parity", "embedded", *words]) == 0
    assert capsys.readouterr().out.count("equal ") == 4
    assert told == [("warm-up", 1, Embedded().warm_up_steps)]


def test_the_engine_is_the_one_that_a_spec_samples_with(tmp_path, capsys):
    spec = tmp_path / "own.yaml"
    spec.write_text("rollout: {engine: vllm, server: 'http://127.0.0.1:9'}\ninjection: {mode: w4a4}\n")
    for words, code, line in (
        ([], 2, "rollout.server http://127.0.0.1:9 does not answer"),
        (["rollout.server=http://127.0.0.1:8"], 2, "rollout.server http://127.0.0.1:8 does not answer"),
        (["--server", "http://127.0.0.1:7"], 2, "rollout.server http://127.0.0.1:7 does not answer"),
        (["rollout.server=null"], 2, "vLLM is not installed here"),
    ):
        assert main(["parity", str(spec), *words]) == code
        assert line in capsys.readouterr().err


def test_an_engine_that_is_not_installed_says_so():
    with pytest.raises(NotFoundError, match="vLLM is not installed here"):
        engine_of(RolloutEngine(engine="vllm"))
