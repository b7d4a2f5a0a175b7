"""The engines that can be audited, by name. Adding one is one entry."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel

from fp4rl.engines.parity.audit import Engine
from fp4rl.engines.rollout.samplers import add_samplers
from fp4rl.inject.attach import Attachment
from fp4rl.inject.probe import require_rounded
from fp4rl.rl.generate import sampler_named
from fp4rl.rl.stream import weight_stream
from fp4rl.spec.errors import NotFoundError, nearest
from fp4rl.spec.rollout import RolloutEngine
from fp4rl.spec.words import counted


def engine_of(chosen: RolloutEngine, dtype: str = "float32") -> Engine:
    """Make an engine. `dtype` is the model's.

    Raises NotFoundError for an unknown one, for one that is not installed and for a server that does not answer,
    InvalidValueError for a server that was started otherwise than docs/how-to/scale.md says.
    """
    if chosen.engine not in _ENGINES:
        raise NotFoundError(f"--engine {chosen.engine}: there is no such engine{nearest(chosen.engine, _ENGINES)}")
    add_samplers()
    return _ENGINES[chosen.engine](chosen, dtype)


def _transformers(chosen: RolloutEngine, _: str) -> Engine:
    def held(_: PreTrainedModel, attachment: Attachment | None) -> str:
        if attachment is None:
            return "the model itself, without injection"
        sites = require_rounded(attachment)
        return f"the operands of {counted(sites, 'layer')} are what their masters round to"

    return Engine("transformers", sampler_named(chosen), held)


def _vllm(chosen: RolloutEngine, dtype: str) -> Engine:
    sampler: Any = sampler_named(chosen)
    if chosen.server is not None:
        sampler.server.require_usable(dtype)

    def held(model: PreTrainedModel, _: Attachment | None) -> str:
        if chosen.server is not None:
            return f"{counted(sampler.compare(model), 'tensor')} of the stream, every value equal in its worker"
        from fp4rl.engines.rollout.held import require_held

        tensors = require_held(sampler.module, weight_stream(model))
        return f"{counted(tensors, 'tensor')} of the stream, every value equal in vLLM"

    return Engine("vllm" if chosen.server is None else f"vllm at {chosen.server}", sampler, held)


_ENGINES: Mapping[str, Callable[[RolloutEngine, str], Engine]] = MappingProxyType(
    {"transformers": _transformers, "vllm": _vllm}
)
