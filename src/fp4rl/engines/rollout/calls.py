"""The HTTP calls of a vLLM server: each failure is one line that names the cure."""

import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from fp4rl.spec.errors import CheckFailed, EngineLost, InvalidValueError, shown

_LONGEST_S, _HELLO_S = 3600.0, 60.0  # that an answer may take, and the first
_HOW = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --enforce-eager --no-enable-prefix-caching "
    "--logprobs-mode processed_logprobs --worker-extension-cls fp4rl.engines.rollout.worker.Worker "
    """--weight-transfer-config '{"backend": "fp4rl"}'"""
)
_NEEDED = {
    "eager": (True, "--enforce-eager: in a compiled graph the rounding of inputs would be lost"),
    "prefix_caching": (False, "--no-enable-prefix-caching: its entries are of earlier weights"),
    "kv_cache_dtype": ("auto", "--kv-cache-dtype auto: another dtype rounds keys and values as no injection says"),
    "logprobs_mode": ("processed_logprobs", "--logprobs-mode processed_logprobs"),
    "weight_transfer": ("fp4rl", """--weight-transfer-config '{"backend": "fp4rl"}'"""),
}


class Server:
    """A vLLM server by its address, `http://HOST:PORT`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.about: dict[str, Any] = {}

    def post(self, path: str, *, within_s: float = _LONGEST_S, **content: Any) -> Any:
        """Return what the server answers; EngineLost where none does, CheckFailed where it says that it failed."""
        request = Request(self.address + path, json.dumps(content).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=within_s) as reply:
                said = reply.read()
        except HTTPError as error:
            if error.code in (403, 404):
                raise InvalidValueError(f"rollout.server {self.address} has no {path}; start it so: {_HOW}") from None
            said = error.read().decode(errors="replace").strip().splitlines()
            raise CheckFailed(f"rollout.server {self.address}{path}: {error.code} {(said or [''])[0][:300]}") from None
        except (OSError, HTTPException) as error:
            why = getattr(error, "reason", error)
            raise EngineLost(
                f"rollout.server {self.address} does not answer ({why}): start it, then repeat the command; a run "
                "goes on from its last checkpoint, where it has one"
            ) from None
        try:
            return json.loads(said or b"null")
        except ValueError:
            raise InvalidValueError(
                f"rollout.server {self.address}{path} answers {shown(said)}, which is no JSON: it is no vLLM server; "
                f"start one so: {_HOW}"
            ) from None

    def worker(self, method: str, *arguments: Any, within_s: float = _LONGEST_S) -> Any:
        """Return what a method of the server's one worker returns; InvalidValueError where it has several, or none."""
        reply = self.post("/collective_rpc", within_s=within_s, method=method, args=arguments)
        results = reply.get("results") if isinstance(reply, dict) else None
        if not isinstance(results, list) or not results:
            raise InvalidValueError(f"rollout.server {self.address} is no vLLM server; start one so: {_HOW}")
        if len(results) > 1:
            raise InvalidValueError(
                f"rollout.server {self.address} has {len(results)} workers, each with a part of the model; give it "
                "--tensor-parallel-size 1 and --pipeline-parallel-size 1: weights are compared within one worker"
            )
        return json.loads(results[0]) if isinstance(results[0], str) else results[0]

    def require_usable(self, dtype: str) -> None:
        """Require a server that computes as the model does; InvalidValueError names the option that it lacks."""
        try:
            self.about = self.worker("fp4rl_open", within_s=_HELLO_S)
        except CheckFailed:
            raise InvalidValueError(
                f"rollout.server {self.address} has no worker of fp4rl; start it so: {_HOW}"
            ) from None
        lacking = sorted({*_NEEDED, "dtype", "max_model_len"} - set(self.about or ()))
        if lacking:
            raise InvalidValueError(
                f"rollout.server {self.address} has a worker of another version of fp4rl, which does not tell its "
                f"{lacking[0]}; start it with the version that is here"
            )
        for key, (wanted, option) in {**_NEEDED, "dtype": (dtype, f"--dtype {dtype}, as the model")}.items():
            if self.about[key] != wanted:
                raise InvalidValueError(
                    f"rollout.server {self.address} was started with {key} {self.about[key]}; give it {option}"
                )
        self.post("/init_weight_transfer_engine", init_info={})

    def require_length(self, length: int) -> None:
        """Raise InvalidValueError where a prompt and its answer may not fit the server."""
        if length > self.about["max_model_len"]:
            raise InvalidValueError(
                f"rollout.server {self.address}: prompt and answer take up to {length} tokens; give it --max-model-len"
            )
