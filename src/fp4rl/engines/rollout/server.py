"""A vLLM server as a sampler: it gets its weights from the stream before every call, under a version of their own.

The answers say which version of the weights each token was drawn with. What its worker counted while it answered is
credited to the states of the live model, so that the evidence of a rollout is the same whoever sampled it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.engines.rollout.calls import Server
from fp4rl.engines.rollout.held import Held, require_equal
from fp4rl.engines.rollout.kinds import active, rounded_points
from fp4rl.engines.rollout.request import audited, cut_answer, parameters, require_possible
from fp4rl.inject.evidence import Meter
from fp4rl.inject.site import SiteState
from fp4rl.rl import processes
from fp4rl.rl.generate import Generation, Sampling
from fp4rl.rl.stream import injected_states, weight_stream
from fp4rl.spec.errors import CheckFailed, EngineDiffers, InvalidValueError
from fp4rl.spec.evidence import WeightsServed
from fp4rl.spec.formats import describe

_PART = 1 << 30  # bytes of a file that weights are handed over in
_AT_ONCE = 64  # requests


class VllmServer:
    """A sampler (`rl.generate.Sampler`) of the server at `address`, on this machine.

    Raises EngineLost where no server answers, InvalidValueError for one that was started otherwise than
    docs/how-to/scale.md says and for what vLLM does not compute as the model does, CheckFailed for answers of other
    weights than those that were sent, and where its worker rounded nothing.
    """

    def __init__(self, address: str) -> None:
        self.server = Server(address)
        self._run, self._calls, self._opened = uuid4().hex[:8], 0, False
        self._lines: list[WeightsServed] = []

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        sampling: Sampling,
    ) -> list[Generation]:
        """Answer `prompts` with the present weights of `model`; see `Sampler`."""
        sites = active(injected_states(model))
        require_possible(sites, sampling)
        self._open(model, max(map(len, prompts)) + sampling.max_new_tokens)
        self._calls += 1
        version = f"{self._run}-{self._calls}"
        tensors, compared = self.refresh(model, version), 0
        if audited(self._calls):
            compared = self.compare(model)
        for why in self.server.worker("fp4rl_begin", *described(sites)):
            raise InvalidValueError(why)
        try:
            settings = parameters(model, sampling, len(prompts))
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                replies = list(pool.map(self._generate, prompts, settings))
        finally:
            counted = self.server.worker("fp4rl_end")
        credit(sites, counted)
        choices = [each for reply in replies for each in sorted(reply["choices"], key=lambda each: each["index"])]
        _require_version(choices, version)
        self._lines.append(WeightsServed(weight_version=version, tensors=tensors, compared=compared))
        return [_answer(tokenizer, each, sampling) for each in choices]

    def evidence(self) -> list[WeightsServed]:
        """Return a line for each call since the last time."""
        lines, self._lines = self._lines, []
        return lines

    def refresh(self, model: PreTrainedModel, version: str) -> int:
        """Give the server the weights that the model computes with now, as `version`; return how many tensors."""
        tensors = 0
        self.server.post("/start_weight_update")
        for path, names in _files(weight_stream(model)):
            self.server.post("/update_weights", update_info={"path": path})
            tensors += len(names)
        self.server.post("/finish_weight_update", weight_version=version)
        return tensors

    def compare(self, model: PreTrainedModel) -> int:
        """Compare what the server multiplies by with the stream, by value; return the number of tensors."""
        results, sent = list[Held](), list[str]()
        for path, names in _files(weight_stream(model)):
            sent += names
            rows = self.server.worker("fp4rl_compare", path, names, not results)
            results += [Held(row[0], row[1], row[2], tuple(row[3]) if row[3] else None) for row in rows]
        if [each.name for each in results] != sent:
            raise EngineDiffers(f"the server compared {len(results)} of the {len(sent)} tensors that it got", "weights")
        return require_equal(results)

    def _open(self, model: Any, length: int) -> None:
        if not self._opened:
            if processes.count() > 1:
                raise InvalidValueError("rollout.server answers one process; several would each send it other weights")
            self.server.require_usable(str(model.dtype).removeprefix("torch."))
            self._opened = True
        self.server.require_length(length)

    def _generate(self, prompt: Sequence[int], settings: Mapping[str, Any]) -> Any:
        return self.server.post("/inference/v1/generate", token_ids=list(prompt), sampling_params=settings)


def described(sites: Sequence[SiteState]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what a worker must know to round at `sites`, as plain values: see `rounder.state_of`."""
    rows = [
        {
            "kind": state.plan.site.kind,
            "name": state.plan.name,
            "shape": state.plan.site.shape,
            "formats": {point: describe(getattr(state.plan, point)) for point in rounded_points(state)},
            "step": state.rng.step,
        }
        for state in sites
    ]
    keys = {"dtype", "seed"}  # of a worker, which computes no gradients
    return rows, sites[0].injection.model_dump(mode="json", include=keys) if sites else {}


def credit(sites: Sequence[SiteState], counted: Sequence[Mapping[str, Any]]) -> None:
    """Add what the worker counted to the states of the model; CheckFailed where it computed or rounded nothing."""
    if len(counted) != len(sites):
        raise CheckFailed(f"the server counted at {len(counted)} of {len(sites)} sites: it was started again meanwhile")
    for state, row in zip(sites, counted, strict=True):
        meters = {point: Meter(*row["meters"].get(point, ())) for point in rounded_points(state)}
        for point in [point for point, meter in meters.items() if not (row["calls"] and meter.elements)]:
            raise EngineDiffers(
                f"{state.plan.name}: the server answered and its worker rounded no {point} there", "calls"
            )
        if not row["calls"]:
            raise EngineDiffers(
                f"{state.plan.name}: the server answered and its worker did not count a call of it", "calls"
            )
        state.calls += row["calls"]
        for point, meter in meters.items():
            state.meter(point).add(meter)


def _require_version(choices: Sequence[Mapping[str, Any]], version: str) -> None:
    used = {span["version"] for each in choices for span in each["weight_versions"] or ()}
    if used != {version}:
        raise EngineDiffers(
            f"the server answered with weights of version {', '.join(sorted(used)) or 'unknown'} where {version} was "
            "sent: another run uses it too, or an update was lost",
            "versions",
        )


def _answer(tokenizer: PreTrainedTokenizerBase, choice: Mapping[str, Any], sampling: Sampling) -> Generation:
    logps = [each["logprob"] for each in (choice["logprobs"] or {}).get("content") or ()]
    return cut_answer(tokenizer, choice["token_ids"], choice["finish_reason"] == "stop", logps, sampling)


def _files(stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, list[str]]]:
    """Yield (path, names) of files that hold a stream part by part; each is gone when the next is made."""
    with TemporaryDirectory(prefix="fp4rl-weights-") as folder:
        path = str(Path(folder) / "part.safetensors")
        for part in _parts(stream):
            save_file(part, path)
            yield path, list(part)


def _parts(stream: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in stream:
        if part and size + tensor.nbytes > _PART:
            yield part
            part, size = {}, 0
        part[name] = tensor.detach().cpu().contiguous().clone()
        size += tensor.nbytes
    yield part
