"""A vLLM server: versions, counters, faults in its worker, and its end (`make test-vllm`; elsewhere skipped).

The oracle is vLLM: the log-probabilities that the server computes with its own kernels, in its own attention.
"""

import json
import time
from urllib.request import urlopen

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm makes an environment with it")

from processes import evidence, free_port, kill, ran, serving, started
from scores import SAMPLED, audited, distances, fed, near, prompts, rollout

from fp4rl.cli.main import main
from fp4rl.engines.rollout.server import VllmServer
from fp4rl.rl.generate import Sampling
from fp4rl.rl.stream import weight_stream
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.injection import Injection


@pytest.mark.parametrize("described", [{"kv_cache": "mxfp4"}, {"mode": "w4a8", "kv_cache": "mxfp8"}], ids=str)
def test_a_rounded_cache_is_rounded_in_the_worker_and_counted_to_the_element(described, remote, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    with rollout(model, Injection.model_validate(described)) as attachment:
        answers = remote(model, tokenizer, asked, SAMPLED)
        attachment.require_calls()
        rows = [row for row in attachment.evidence() if row.point == "kv_cache"]
        tokens = sum(map(len, fed(asked, answers)))
        assert [row.elements for row in rows] == [tokens * 2 * 64] * 2  # keys and values, two heads of 32
        assert all(row.looks and row.share_changed > 0.5 for row in rows)
        attachment.set_phase("evaluation")
        assert near(model, asked, answers) >= 0.99
        attachment.set_phase("reference")
        assert near(model, asked, answers) < 0.5


def test_keys_rounded_without_values_are_another_policy(remote, policy):
    model, tokenizer = policy
    asked = prompts(tokenizer)
    remote.server.worker("fp4rl_plant", "keys_alone")
    with rollout(model, Injection.model_validate({"kv_cache": "mxfp4"})) as attachment:
        answers = remote(model, tokenizer, asked, SAMPLED)
        attachment.set_phase("evaluation")
        assert near(model, asked, answers) < 0.5


def test_a_worker_that_stores_unrounded_keys_and_values_stops_the_run(remote, policy):
    model, tokenizer = policy
    remote.server.worker("fp4rl_plant", "unstored")
    with (
        rollout(model, Injection.model_validate({"kv_cache": "mxfp8"})),
        pytest.raises(CheckFailed, match=r"layers\.0\.self_attn: .* its worker rounded no kv_cache there"),
    ):
        remote(model, tokenizer, prompts(tokenizer), SAMPLED)


def test_a_layer_that_reads_the_cache_of_another_is_refused(remote, policy):
    model, tokenizer = policy
    remote.server.worker("fp4rl_plant", "shared")
    with rollout(model, Injection.model_validate({"kv_cache": "mxfp8"})) as attachment:
        with pytest.raises(InvalidValueError, match=r"layers\.1\.self_attn\.attn reads the cache of layers\.0; take"):
            remote(model, tokenizer, prompts(tokenizer), SAMPLED)
        remote.server.worker("fp4rl_plant", "none")
        remote(model, tokenizer, prompts(tokenizer), SAMPLED)
        attachment.require_calls()


def test_each_call_has_a_version_of_the_weights_as_evidence(remote, policy, address):
    model, tokenizer = policy
    for _ in range(3):
        remote(model, tokenizer, prompts(tokenizer), SAMPLED)
    lines = remote.evidence()
    assert len({line.weight_version for line in lines}) == 3
    tensors = len(list(weight_stream(model)))
    assert [(line.tensors, line.compared) for line in lines] == [(tensors, tensors), (tensors, tensors), (tensors, 0)]
    with urlopen(f"{address}/weight_info") as reply:
        assert json.load(reply)["weight_version"] == lines[-1].weight_version
    assert not remote.evidence()


# -- planted faults


def test_a_missed_refresh_is_found_by_value(remote, policy):
    model, tokenizer = policy
    remote(model, tokenizer, prompts(tokenizer), SAMPLED)
    remote.server.worker("fp4rl_plant", "missed")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.5
    with pytest.raises(CheckFailed, match=r"layers\.0\.mlp\.up_proj\.weight, in which 1 of"):
        remote(model, tokenizer, prompts(tokenizer), SAMPLED)


def test_answers_of_another_version_are_refused(remote, policy, monkeypatch):
    model, tokenizer = policy
    post = remote.server.post

    def fed_by_another(path, **content):
        if path == "/inference/v1/generate":
            post("/update_weight_version", new_version="another-run-7")
        return post(path, **content)

    monkeypatch.setattr(remote.server, "post", fed_by_another)
    with pytest.raises(CheckFailed, match="weights of version another-run-7"):
        remote(model, tokenizer, prompts(tokenizer), SAMPLED)
    monkeypatch.setattr(
        remote.server, "post", lambda path, **content: post(path, **({} if path.startswith("/finish") else content))
    )
    with pytest.raises(CheckFailed, match="weights of version another-run-7 where"):  # a version that went stale
        remote(model, tokenizer, prompts(tokenizer), SAMPLED)


def test_a_worker_that_does_not_round_stops_the_run(remote, policy):
    model, tokenizer = policy
    with rollout(model, Injection.named("w4a4", "compressed_tensors")) as attachment:
        remote.server.worker("fp4rl_plant", "unrounded")
        remote(model, tokenizer, prompts(tokenizer), SAMPLED)
        with pytest.raises(CheckFailed, match="rounded nothing"):
            attachment.require_calls()
        remote.server.worker("fp4rl_plant", "uncounted")
        with pytest.raises(CheckFailed, match="its worker rounded no input there"):
            remote(model, tokenizer, prompts(tokenizer), SAMPLED)


def test_a_run_that_died_within_an_update_leaves_the_server_usable(remote, policy):
    model, tokenizer = policy
    remote(model, tokenizer, prompts(tokenizer), SAMPLED)
    remote.server.post("/start_weight_update")
    again = VllmServer(remote.server.address)
    assert distances(model, prompts(tokenizer), again(model, tokenizer, prompts(tokenizer), SAMPLED)).max() < 1e-5


def test_sequences_that_do_not_fit_the_server_are_refused(remote, policy):
    model, tokenizer = policy
    with pytest.raises(InvalidValueError, match="give it --max-model-len"):
        remote(model, tokenizer, prompts(tokenizer), Sampling(200))


# -- the audit from the command line


@pytest.mark.usefixtures("remote")
def test_a_server_is_audited_by_value(folder, address, capsys):
    checks, _ = audited(capsys, folder, "--server", address, "--mode", "w4a4")
    assert {name: check["passed"] for name, check in checks.items()} == dict.fromkeys(
        ("weights", "scores", "refresh", "order", "versions"), True
    )
    assert checks["weights"]["seen"] == "26 tensors of the stream, every value equal in its worker"
    assert checks["scores"]["numbers"]["tokens"] > 20
    assert checks["scores"]["numbers"]["max"] < 1e-3
    assert checks["versions"]["numbers"] == {"calls": 9, "versions": 9}


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
def test_a_server_in_which_a_fault_is_planted_is_another_policy(request, fault, check, said, remote, capsys):
    (model, tokenizer), folder, address = (request.getfixturevalue(n) for n in ("policy", "folder", "address"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    remote(model, tokenizer, prompts(tokenizer), SAMPLED)  # so that other weights lie there
    remote.server.worker("fp4rl_plant", fault)
    checks, line = audited(capsys, folder, "--server", address, "--mode", "w4a4", code=1)
    assert checks[check]["passed"] is False
    assert said in checks[check]["seen"]
    assert f"is another policy than the one that is trained: {check}" in line


def test_a_server_of_another_dtype_is_one_line(folder, address, tmp_path, capsys):
    spec = tmp_path / "own.yaml"
    spec.write_text(f"model: {{path: {folder}, dtype: bfloat16}}\nrollout: {{engine: vllm, server: '{address}'}}\n")
    assert main(["parity", str(spec)]) == 2
    assert "give it --dtype bfloat16, as the model" in capsys.readouterr().err


# -- a whole run

SUITE = """
suite: served
base:
  model: {{embedded: {{warm_up_steps: 60}}}}
  training: {{steps: 16, train_batch_size: 4, mini_batch_size: 4, rollout_n: 4, filter_groups: {{metric: reward}}}}
  evaluation: {{count: 12, batch_size: 12}}
  rollout: {{engine: vllm, server: "{address}"}}
arms:
  w4a4: {{injection: {{mode: w4a4, deployment: compressed_tensors}}}}
seeds: [0]
"""


@pytest.mark.slow
def test_a_killed_server_ends_the_run_in_one_line_and_the_command_resumes(folder, tmp_path):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with serving(folder, port, tmp_path / "server.log") as server:
        run = started(tmp_path, SUITE.format(address=address))
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
    assert "start it, then repeat the command" in line
    assert "Traceback" not in said
    assert 3 <= done < 16
    assert evidence(place)[-1] == {"kind": "checkpoint", "step": done}  # nothing that was done is lost
    with serving(folder, port, tmp_path / "server.log"):
        ((result, _, _),) = ran(tmp_path, SUITE.format(address=address)).values()
    assert result["steps_done"] == 16
    steps = [json.loads(line)["step"] for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 17))
