"""The samplers that need another engine than transformers, by the names that an experiment gives them."""

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.rollout import RolloutEngine

if TYPE_CHECKING:
    from fp4rl.rl.generate import Sampler


def add_samplers() -> None:
    """Add them to those that `rl.generate.sampler_named` knows; none is made or imported."""
    from fp4rl.rl.generate import SAMPLERS

    SAMPLERS["vllm"] = _vllm


def _vllm(chosen: RolloutEngine) -> "Sampler":
    if chosen.server is None:
        return _vllm_here(chosen)
    from fp4rl.engines.rollout.server import VllmServer

    return VllmServer(chosen.server)


@cache
def _vllm_here(chosen: RolloutEngine) -> "Sampler":
    """Make the one vLLM engine of this process."""
    if find_spec("vllm") is None:
        raise NotFoundError(
            "rollout.engine vllm: vLLM is not installed here; it wants an environment of its own: make test-vllm"
        )
    from fp4rl.engines.rollout.vllm import Vllm

    return Vllm(chosen)
