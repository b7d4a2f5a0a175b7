"""The kinds of machines that a run of verl is written for, and what each of them changes in its configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fp4rl.engines.verl.keys import ACTOR, MODEL, REF, ROLLOUT


@dataclass(frozen=True)
class Machine:
    """A kind of machine: `devices` a node where nothing else is asked for, its settings, and variables of its shell."""

    name: str
    devices: int
    settings: Mapping[str, Any]
    variables: Mapping[str, str] = field(default_factory=dict)


_NO_COMPILER = {f"{ACTOR}.use_torch_compile": False, f"{ACTOR}.fsdp_config.use_torch_compile": False}
_VLLM = {f"{ROLLOUT}.name": "vllm", f"{ROLLOUT}.tensor_model_parallel_size": 1}

GPU = Machine("gpu", 8, {"trainer.device": "cuda", **_VLLM})
# vLLM-Ascend's own format of weights (NZ) cannot be refreshed in place, and its graphs are not captured in training.
NPU = Machine(
    "npu",
    8,
    {"trainer.device": "npu", **_VLLM, f"{ROLLOUT}.enforce_eager": True, **_NO_COMPILER},
    {"VLLM_ASCEND_ENABLE_NZ": "0"},
)
# verl has no platform and no sampler for CPUs: the module that is named here has both. Ray is told of devices that are
# not there, since verl asks it for one for each process.
CPU = Machine(
    "cpu",
    2,
    {
        "trainer.device": "cpu",
        f"{ROLLOUT}.name": "transformers",
        f"{ROLLOUT}.tensor_model_parallel_size": 1,
        f"{ROLLOUT}.agent.num_workers": 1,
        f"{MODEL}.use_remove_padding": False,
        f"+{MODEL}.override_config.attn_implementation": "sdpa",
        **_NO_COMPILER,
        f"{REF}.use_torch_compile": False,
        f"{REF}.fsdp_config.use_torch_compile": False,
        "reward.num_workers": 1,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "ray_kwargs.ray_init.num_cpus": 32,
        "+ray_kwargs.ray_init.num_gpus": 2,
    },
    {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu"},
)
