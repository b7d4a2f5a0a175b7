"""verl's FSDP engine for language models, under an experiment: injected before sharding, streamed as it computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor
from torch.distributed.tensor import distribute_tensor
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu, offload_fsdp_model_to_cpu
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from fp4rl.engines.verl.policy import Policy
from fp4rl.engines.verl.settings import TRAINER_MODE, VENDOR
from fp4rl.sites.walk import plain_name
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.experiment import Experiment


class Engine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """The engine of actor and reference. `experiment` is set by the worker of this plug-in's trainer alone."""

    experiment: ClassVar[Experiment | None] = None
    policy: Policy

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if self.experiment is None:
            raise InvalidValueError(
                f"this process is under an experiment, and verl runs another trainer, which would not check that it "
                f"acts; write trainer.v1.trainer_mode={TRAINER_MODE}"
            )
        super().__init__(*args, **kwargs)
        if self._qat_enabled:
            raise InvalidValueError("actor.fsdp_config.qat.enable: verl's own QAT would round a second time")
        if self.engine_config.strategy != "fsdp2":
            raise InvalidValueError(
                f"strategy={self.engine_config.strategy}: it holds the weights of a layer in one flat tensor, in which "
                "no weight can be streamed as it is computed with; write fsdp2"
            )

    def _build_fsdp_module(self, module: Any) -> Any:
        assert self.experiment is not None
        policy = self.policy = Policy(module, self.experiment, frozen=bool(self.engine_config.forward_only))
        module = super()._build_fsdp_module(module)
        policy.shard(self._autocast_dtype)
        return module

    def get_per_tensor_param(
        self, layered_summon: bool = False, base_sync_done: bool = False, **kwargs: Any
    ) -> tuple[Iterator[tuple[str, Tensor]], Any]:
        """Return the stream of whole weights as rollouts compute with them, adapters merged, and no adapter."""
        if not self.policy.acts:
            return super().get_per_tensor_param(layered_summon, base_sync_done, **kwargs)  # type: ignore[no-any-return]
        if self._is_lora and not self.model_config.lora.get("merge", False):
            raise InvalidValueError("model.lora.merge: rollouts that get adapters alone keep an unrounded base; set it")
        return self._streamed(), None

    def get_per_tensor_param_shard(self, **kwargs: Any) -> tuple[Iterator[tuple[str, Tensor, Any]], Any]:
        """Return the same stream as this rank's part of each weight, in the order and under the names of verl's."""
        shards, adapter = super().get_per_tensor_param_shard(**kwargs)
        if not self.policy.acts:
            return shards, adapter
        if self._is_lora:
            raise InvalidValueError("verl streams shards of models without adapters alone")
        return self._sharded(shards), adapter

    def get_per_tensor_param_delta_shard(self, **kwargs: Any) -> tuple[Iterator[Any], Any]:
        """Return what changed of `get_per_tensor_param_shard` since the last call."""
        return super().get_per_tensor_param_delta_shard(**kwargs)  # type: ignore[no-any-return]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch to the model without its adapters, which is the reference."""
        with self.policy.during("reference"), super().disable_adapter():
            yield

    def _streamed(self) -> Iterator[tuple[str, Tensor]]:
        offloaded = self._is_offload_param and not self._uses_fsdp2_cpu_offload_policy
        if offloaded:
            load_fsdp_model_to_gpu(self.module)
        try:
            yield from self.policy.stream(self.lr_scheduler.last_epoch, self.optimizer_config.total_training_steps)
        finally:
            if offloaded:
                offload_fsdp_model_to_cpu(self.module)

    def _sharded(self, shards: Iterator[tuple[str, Tensor, Any]]) -> Iterator[tuple[str, Tensor, Any]]:
        specs = {name: (spec, local.dtype) for name, local, spec in shards}
        tied = self._names_of_tied()
        own: dict[str, Tensor] = {}
        for name, whole in self._streamed():
            if name not in specs:
                raise CheckFailed(f"verl streams no shard called {name}, which the policy computes with")
            spec, dtype = specs[name]
            part = whole
            if spec.mesh is not None:
                part = distribute_tensor(whole, spec.mesh, spec.placements, src_data_rank=None).to_local()
            own[name] = part.to(dtype).reshape(-1).clone()
        for name, (spec, _) in specs.items():
            if tied.get(name, name) not in own:
                raise CheckFailed(f"the policy's stream has no {name}, of which verl sends a shard")
            yield name, own[tied.get(name, name)], spec

    def _names_of_tied(self) -> dict[str, str]:
        """Return the further names of weights that are held at several places -> their first one."""
        first: dict[int, str] = {}
        named = self.module.named_parameters(remove_duplicate=False)
        return {plain_name(name): first.setdefault(id(weight), plain_name(name)) for name, weight in named}


def register() -> None:
    """Register the engine with verl for language models on every kind of device."""
    EngineRegistry.register("language_model", ["fsdp", "fsdp2"], ["cuda", "npu", "cpu"], VENDOR)(Engine)
