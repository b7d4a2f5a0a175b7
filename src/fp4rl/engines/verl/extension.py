"""The worker of verl's vLLM under an experiment: verl's own extension, which takes weights, and the rest is rounded.

verl's server names this class to vLLM, whose worker imports it in a process of its own. What is rounded, and where,
comes over `collective_rpc` after every set of weights (`rollouts.py`); new weights by themselves end it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from fp4rl.engines.rollout.held import follow_embeddings
from fp4rl.engines.rollout.mixture import begin_reload, require_reloaded
from fp4rl.engines.rollout.rounder import Rounder


class Extension(Rounder, vLLMColocateWorkerExtension):  # type: ignore[misc]
    """verl's extension of vLLM's worker, which rounds besides."""

    vllm_config: Any

    def update_weights_from_ipc(
        self, peft_config: Mapping[str, Any] | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Take the weights of the stream; nothing is rounded from here on until `fp4rl_begin`.

        verl loads them into the parameters. vLLM for CPUs has packed those and let them go, so that there, and there
        alone, what verl receives goes through vLLM's own reload.
        """
        self.fp4rl_end()
        if self.model_runner.device.type != "cpu":
            super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
            return
        module = self.model_runner.get_model()
        begin_reload(module)
        initialize_layerwise_reload(module)
        receiver = BucketedWeightReceiver(self._get_zmq_handle(), torch.device("cpu"), use_shm)
        receiver.receive_weights(self._fp4rl_load)
        finalize_layerwise_reload(module, self.vllm_config.model_config)
        require_reloaded(module)
        follow_embeddings(module)

    def _fp4rl_load(self, weights: list[tuple[str, Tensor]], is_last: bool) -> None:  # noqa: ARG002 - verl's callback
        copies = [
            (name, value.clone()) for name, value in weights
        ]  # verl takes its buffer back; a reload keeps tensors
        self._update_weights(copies, None, False)
