"""What a server of vLLM may answer, or fail to: each ends in one line that names the cure. No vLLM is needed here."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from fp4rl.engines.rollout.calls import Server
from fp4rl.engines.rollout.server import VllmServer, described
from fp4rl.inject.attach import attach
from fp4rl.inject.evidence import Meter
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.generate import Sampling
from fp4rl.rl.stream import injected_states, weight_stream
from fp4rl.spec.errors import CheckFailed, EngineDiffers, EngineLost, InvalidValueError
from fp4rl.spec.formats import format_of
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded

ABOUT = {
    "dtype": "float32",
    "max_model_len": 64,
    "eager": True,
    "prefix_caching": False,
    "kv_cache_dtype": "auto",
    "logprobs_mode": "processed_logprobs",
    "weight_transfer": "fp4rl",
}


class Imitation:
    """Answers as a server does: `answers` maps a path, or a worker's method, to (status, content) or what makes it."""

    def __init__(self):
        self.answers, self.asked = {"fp4rl_open": ABOUT}, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, content))
                status, answer = outer.answer(self.path, content)
                text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, path, content):
        if path == "/collective_rpc":
            known = self.answers.get(content["method"], [])
            return known if isinstance(known, tuple) else (200, {"results": [known]})
        known = self.answers.get(path, {})
        return known(content) if callable(known) else known if isinstance(known, tuple) else (200, known)


@pytest.fixture
def imitation():
    one = Imitation()
    yield one
    one.http.shutdown()
    one.http.server_close()


@pytest.fixture
def policy():
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    return build(Embedded(), tokenizer).eval(), tokenizer


def answering(imitation, *, version=None, calls=1, elements=64):
    """Let it answer every prompt with one end token, of the version sent last or of `version`."""

    def choices(_):
        sent = [c["weight_version"] for path, c in imitation.asked if path == "/finish_weight_update"][-1]
        span = {"version": version or sent, "start": 0, "end": 1}
        one = {"index": 0, "token_ids": [2], "finish_reason": "stop", "weight_versions": [span]}
        return 200, {"choices": [one | {"logprobs": {"content": [{"token_id": 2, "logprob": -0.5}]}}]}

    def counted(content):
        begun = [c["args"][0] for path, c in imitation.asked if c.get("method") == "fp4rl_begin"]
        meter = [0, elements, 1, 0, 2, 64, 32, 0.5, 2.0]
        return [
            {"calls": calls, "meters": dict.fromkeys(site["formats"], meter)} for site in (begun[-1] if begun else ())
        ]

    imitation.answers["/inference/v1/generate"] = choices
    answer = imitation.answer
    imitation.answer = lambda path, content: (
        (200, {"results": [counted(content)]}) if content.get("method") == "fp4rl_end" else answer(path, content)
    )


SAMPLING = Sampling(4, 1.0, logps=True)


def unaudited(address):
    engine = VllmServer(address)
    engine._calls = 2  # the third call is not compared
    return engine


def test_no_server_ends_in_one_line_with_the_cure():
    with pytest.raises(EngineLost, match=r"does not answer .*start it, then repeat the command"):
        Server("http://127.0.0.1:9").post("/x")


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [
        ("eager", False, "--enforce-eager"),
        ("prefix_caching", True, "--no-enable-prefix-caching"),
        ("kv_cache_dtype", "fp8", "--kv-cache-dtype auto"),
        ("logprobs_mode", "raw_logprobs", "--logprobs-mode processed_logprobs"),
        ("weight_transfer", None, "--weight-transfer-config"),
        ("dtype", "bfloat16", "--dtype float32"),
    ],
)
def test_a_server_that_would_be_another_policy_is_refused(key, value, option, imitation):
    imitation.answers["fp4rl_open"] = ABOUT | {key: value}
    with pytest.raises(InvalidValueError, match=f"was started with {key} {value}; give it {option}"):
        Server(imitation.address).require_usable("float32")


def test_a_server_without_the_worker_or_its_routes_is_told_how_to_start(imitation):
    imitation.answers["fp4rl_open"] = 500, {"error": "no such method"}
    with pytest.raises(InvalidValueError, match=r"--worker-extension-cls fp4rl\.engines\.rollout\.worker\.Worker"):
        Server(imitation.address).require_usable("float32")
    imitation.answers["/collective_rpc"] = 404, {}
    for status in (403, 404):
        imitation.answers["/somewhere"] = status, {}
        with pytest.raises(InvalidValueError, match="VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out"):
            Server(imitation.address).post("/somewhere")


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({"results": [ABOUT, ABOUT]}, "has 2 workers, each with a part of the model; give it --tensor-parallel-size 1"),
        ({"results": []}, "is no vLLM server; start one so: VLLM_SERVER_DEV_MODE=1"),
        (["hello"], "is no vLLM server; start one so: VLLM_SERVER_DEV_MODE=1"),
        (b"<html>hello</html>", r"/collective_rpc answers b'<html>hello</html>', which is no JSON: it is no vLLM"),
        ({"results": [{"dtype": "float32"}]}, "a worker of another version of fp4rl, which does not tell its eager"),
    ],
)
def test_what_is_no_server_of_one_whole_model_is_refused(answer, line, imitation):
    imitation.answer = lambda *_: (200, answer)
    with pytest.raises(InvalidValueError, match=line):
        Server(imitation.address).require_usable("float32")


def test_a_worker_that_compares_less_than_it_got_is_another_policy(imitation, policy):
    answering(imitation)
    imitation.answers["fp4rl_compare"] = []
    with pytest.raises(EngineDiffers, match=r"compared 0 of the \d+ tensors") as found:
        VllmServer(imitation.address)(*policy, [[5, 6]], SAMPLING)
    assert found.value.check == "weights"


def test_what_the_worker_counted_is_credited_to_the_sites(imitation, policy):
    model, tokenizer = policy
    answering(imitation, calls=3, elements=640)
    described = {"mode": "w4a4", "deployment": "compressed_tensors", "kv_cache": "mxfp8"}
    with attach(model, Injection.model_validate(described)) as attachment:
        attachment.set_phase("rollout")
        (answer,) = unaudited(imitation.address)(model, tokenizer, [[5, 6]], SAMPLING)
        attachment.require_calls()
        rows = [row for row in attachment.evidence() if row.point in ("input", "kv_cache")]
    assert sorted(Counter(row.point for row in rows).items()) == [("input", 14), ("kv_cache", 2)]
    assert (answer.tokens, answer.ended, answer.logps.tolist()) == ([2], True, [-0.5])
    assert {(row.calls, row.elements, row.share_changed, row.relative_error) for row in rows} == {(3, 640, 0.5, 0.5)}
    asked = [content for path, content in imitation.asked if path == "/inference/v1/generate"]
    assert asked[0]["token_ids"] == [5, 6]
    assert asked[0]["sampling_params"]["stop_token_ids"] == [2]


@pytest.mark.parametrize(
    ("described", "point"),
    [({"mode": "w4a4", "deployment": "compressed_tensors"}, "input"), ({"kv_cache": "mxfp8"}, "kv_cache")],
)
@pytest.mark.parametrize(("calls", "elements"), [(0, 64), (3, 0)])
def test_zero_counts_stop_the_run(calls, elements, described, point, imitation, policy):
    model, tokenizer = policy
    answering(imitation, calls=calls, elements=elements)
    with attach(model, Injection.model_validate(described)) as attachment:
        attachment.set_phase("rollout")
        with pytest.raises(CheckFailed, match=f"its worker rounded no {point} there"):
            unaudited(imitation.address)(model, tokenizer, [[5, 6]], SAMPLING)


def test_answers_of_another_version_are_refused(imitation, policy):
    answering(imitation, version="default")
    with pytest.raises(CheckFailed, match=r"weights of version default where .*another run uses it too"):
        unaudited(imitation.address)(*policy, [[5, 6]], SAMPLING)


def test_a_difference_that_the_worker_found_is_named(imitation, policy):
    answering(imitation)
    names = [name for name, _ in weight_stream(policy[0])]
    wrong = {"model.norm.weight": [64, 3, [7]]}
    imitation.answers["fp4rl_compare"] = [[name, *wrong.get(name, [9, 0, None])] for name in names]
    said = rf"1 of {len(names)} tensors, such as model\.norm\.weight, in which 3 of 64"
    with pytest.raises(CheckFailed, match=said):
        VllmServer(imitation.address)(*policy, [[5, 6]], SAMPLING)


def test_a_description_of_sites_is_read_back_as_the_same_formats(policy):
    model, _ = policy
    for mode in ("w4a4", "w4a8", "nvfp4_w4a4"):
        settings = {} if mode == "nvfp4_w4a4" else {"straight_through": "smooth"}  # of training alone
        with attach(model, Injection.named(mode, "compressed_tensors", **settings)) as attachment:
            attachment.set_phase("rollout")
            states = injected_states(model)
            rows, injection = described(states)
            sent = json.loads(json.dumps(rows))
            assert [format_of(row["formats"]["input"]) for row in sent] == [state.plan.input for state in states]
            assert Injection.model_validate(injection).dtype == states[0].injection.dtype
            attachment.set_phase("reference")
            assert not any(row["formats"] for row in described(injected_states(model))[0])


def test_what_the_worker_cannot_round_is_refused_in_its_words(imitation, policy):
    answering(imitation)
    imitation.answers["fp4rl_begin"] = ["kv_cache of x: y; take transformers"]
    with pytest.raises(InvalidValueError, match=r"^kv_cache of x: y; take transformers$"):
        unaudited(imitation.address)(*policy, [[5, 6]], SAMPLING)


def test_a_description_of_attention_is_read_back_with_its_format(policy):
    model, _ = policy
    described_as = {"weight": "mxfp4", "kv_cache": {"name": "nvfp4", "factor": "per_token"}}
    with attach(model, Injection.model_validate(described_as)) as attachment:
        attachment.set_phase("rollout")
        states = injected_states(model)
        rows, _ = described(states)
        sent = [row for row in json.loads(json.dumps(rows)) if row["kind"] == "attention"]
        assert [row["name"] for row in sent] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
        assert {format_of(row["formats"]["kv_cache"]) for row in sent} == {attachment.table.injection.kv_cache}
        assert not any(row["formats"] for row in rows if row["kind"] == "linear")


def test_meters_of_two_processes_add_up():
    one, other, whole = Meter(), Meter(), Meter()
    for meters, seed in (((one, whole), 0), ((other, whole), 1)):
        before = torch.randn(100, generator=torch.Generator().manual_seed(seed))
        for meter in meters:
            meter.elements += 100
            meter.look(1, before, before.round(), lambda: True)
    one.add(other)
    assert (one.elements, one.looks, one.missed) == (whole.elements, whole.looks, whole.missed) == (200, 2, 0)
    assert one.share_changed == whole.share_changed
    assert one.relative_error == pytest.approx(whole.relative_error)
