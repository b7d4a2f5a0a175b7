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


def engine_named(name: str) -> Engine:
    """Make the engine of that name; raises NotFoundError for an unknown one, and for one that is not installed."""
    if name not in _ENGINES:
        raise NotFoundError(f"--engine {name}: there is no such engine{nearest(name, _ENGINES)}")
    add_samplers()
    return _ENGINES[name]()


def _transformers() -> Engine:
    def held(_: PreTrainedModel, attachment: Attachment | None) -> str:
        if attachment is None:
            return "the model itself, without injection"
        sites = require_rounded(attachment)
        return f"the operands of {counted(sites, 'layer')} are what their masters round to"

    return Engine("transformers", sampler_named(RolloutEngine(engine="transformers")), held)


def _vllm() -> Engine:
    sampler: Any = sampler_named(RolloutEngine(engine="vllm"))

    def held(model: PreTrainedModel, _: Attachment | None) -> str:
        from fp4rl.engines.rollout.held import require_held

        tensors = require_held(sampler.module, weight_stream(model))
        return f"{counted(tensors, 'tensor')} of the stream, every value equal in vLLM"

    return Engine("vllm", sampler, held)


_ENGINES: Mapping[str, Callable[[], Engine]] = MappingProxyType({"transformers": _transformers, "vllm": _vllm})
