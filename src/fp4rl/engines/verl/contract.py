"""What this plug-in uses of verl: every hook with its parameters, and the versions on which they were checked.

verl logs a plug-in that fails to load at DEBUG alone, and renames its seams from release to release. So all of them
are compared before anything is registered, and the first that is missing or changed ends the process with one line.
"""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from fp4rl.spec.errors import CheckFailed

VERSIONS = ("0.9.1",)
"""The versions of verl on which the hooks below were compared and `make test-verl` ran."""

STREAMS = frozenset({"get_per_tensor_param", "get_per_tensor_param_shard", "get_per_tensor_param_delta_shard"})
"""The methods by which verl's FSDP engine gives its weights away; the engine wraps each of them."""

ENGINE = ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngineWithLMHead")
_TRAINER = "verl.trainer.ppo.v1.trainer_base"


@dataclass(frozen=True)
class Hook:
    """A function of verl: its module, its name in it, and the names of its parameters."""

    module: str
    name: str
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def _hooks(module: str, of: str, **parameters: str) -> tuple[Hook, ...]:
    return tuple(Hook(module, f"{of}{name}", tuple(names.split())) for name, names in parameters.items())


HOOKS: tuple[Hook, ...] = (
    *_hooks("verl.workers.engine.base", "EngineRegistry.", register="model_type backend device vendor"),
    *_hooks(
        ENGINE[0],
        f"{ENGINE[1]}.",
        __init__="self model_config engine_config optimizer_config checkpoint_config",
        _build_fsdp_module="self module",
        disable_adapter="self",
        get_per_tensor_param="self layered_summon base_sync_done kwargs",
        get_per_tensor_param_shard="self kwargs",
        get_per_tensor_param_delta_shard="self kwargs",
    ),
    *_hooks("verl.utils.fsdp_utils", "", load_fsdp_model_to_gpu="model", offload_fsdp_model_to_cpu="model empty_cache"),
    *_hooks("verl.workers.engine_workers", "ActorRolloutRefWorker.", init_model="self"),
    *_hooks("verl.workers.engine_workers", "ActorRolloutRefWorker.", update_weights="self global_steps mode"),
    *_hooks("verl.workers.rollout.replica", "RolloutReplicaRegistry.", register="name loader"),
    *_hooks("verl.workers.engine_workers", "TrainingWorker.", reset="self"),
    *_hooks(
        "verl.single_controller.base.decorator", "", register="dispatch_mode execute_mode blocking materialize_futures"
    ),
    *_hooks(_TRAINER, "", register_trainer="name"),
    *_hooks(
        _TRAINER,
        "PPOTrainer.",
        __init__="self config",
        _init_resource_pool_mgr="self",
        _compute_metrics="self batch metrics timing_raw global_steps epoch",
        _save_checkpoint="self",
        on_validate_begin="self",
        on_validate_end="self",
        on_train_end="self",
        fit="self agent_loop_manager",
    ),
    *_hooks("verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync.", on_init_end="self", on_step_end="self"),
    *_hooks(
        "verl.checkpoint_engine.base",
        "CheckpointEngineManager.",
        update_weights="self global_steps",
        sleep_replicas="self",
    ),
)

_VLLM = "verl.workers.rollout.vllm_rollout"
ROLLOUT_HOOKS: tuple[Hook, ...] = (
    *_hooks(
        f"{_VLLM}.vllm_async_server",
        "vLLMHttpServer.",
        generate="self prompt_ids sampling_params request_id image_data video_data audio_data mm_processor_kwargs "
        "priority kv_transfer_params",
        _get_worker_extension_cls="self",
    ),
    *_hooks(
        f"{_VLLM}.vllm_async_server",
        "vLLMReplica.",
        __init__="self replica_rank config model_config gpus_per_node is_reward_model is_teacher_model name_suffix",
    ),
    *_hooks(
        f"{_VLLM}.utils",
        "vLLMColocateWorkerExtension.",
        update_weights_from_ipc="self peft_config base_sync_done use_shm",
        _update_weights="self weights peft_config base_sync_done",
        _get_zmq_handle="self",
    ),
    *_hooks(f"{_VLLM}.bucketed_weight_transfer", "BucketedWeightReceiver.", receive_weights="self on_bucket_received"),
    *_hooks(f"{_VLLM}.vllm_rollout", "ServerAdapter.", _ensure_server_handle="self"),
)
"""The hooks of verl's vLLM rollout. They are compared where a replica is made: to import them is to import vLLM."""


def require(hooks: tuple[Hook, ...] = HOOKS) -> str:
    """Return verl's version. Raises CheckFailed for another version, for a hook that is missing or has other
    parameters, and for a stream of weights that the engine does not wrap."""
    import verl

    version: str = verl.__version__
    if version not in VERSIONS:
        raise CheckFailed(f"verl {version} is installed, and its hooks were checked on {', '.join(VERSIONS)} alone")
    for hook in hooks:
        actual = parameters_of(hook)
        if actual != hook.parameters:
            raise CheckFailed(f"verl {version}: {hook} takes ({', '.join(actual)}), not ({', '.join(hook.parameters)})")
    require_streams_known(getattr(importlib.import_module(ENGINE[0]), ENGINE[1]))
    return version


def parameters_of(hook: Hook) -> tuple[str, ...]:
    """Return the parameters of a hook as they are. Raises CheckFailed where verl has none of that name."""
    try:
        target: Any = importlib.import_module(hook.module)
        for part in hook.name.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise CheckFailed(f"verl has no {hook} ({error})") from error
    return tuple(name for name in inspect.signature(target).parameters if name != "cls")


def require_streams_known(engine: type) -> None:
    """Raise CheckFailed for a public per-tensor method that would send weights as they are."""
    unknown = sorted(name for name in dir(engine) if name.startswith("get_per_tensor") and name not in STREAMS)
    if unknown:
        raise CheckFailed(f"{engine.__name__}.{unknown[0]} streams weights, and the plug-in does not wrap it")
