"""What a vLLM server's worker does for a run: load its weights from files, round inputs, count, compare weights.

The server is started with `--worker-extension-cls fp4rl.engines.rollout.worker.Worker` and the weight-transfer backend
`fp4rl`; see docs/how-to/scale.md. Files, since none of vLLM 0.32's own backends works without CUDA. They are
safetensors, which hold numbers and no code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

import vllm
from fp4rl.engines.rollout.held import follow_embeddings, held
from fp4rl.engines.rollout.mixture import begin_reload, require_reloaded
from fp4rl.engines.rollout.rounder import Rounder

BACKEND = "fp4rl"


class Worker(Rounder):
    """Methods that vLLM's worker gets besides its own; they are called over `collective_rpc` with values for JSON."""

    vllm_config: Any
    fp4rl_rows: dict[str, int] | None = None

    def fp4rl_open(self) -> dict[str, Any]:
        """Return how the server computes, and forget what a run that ended within a call has left behind."""
        self.fp4rl_end()
        self._weight_update_active = False
        model, cache = self.vllm_config.model_config, self.vllm_config.cache_config
        transfer = self.vllm_config.weight_transfer_config
        dtype = str(model.dtype).removeprefix("torch.")
        return {
            "vllm": vllm.__version__,
            "dtype": dtype,
            "kv_cache_dtype": "auto" if cache.cache_dtype == dtype else cache.cache_dtype,
            "max_model_len": model.max_model_len,
            "eager": bool(model.enforce_eager),
            "logprobs_mode": model.logprobs_mode,
            "prefix_caching": bool(cache.enable_prefix_caching),
            "weight_transfer": transfer.backend if transfer is not None else None,
        }

    def fp4rl_compare(self, path: str, names: Sequence[str], first: bool) -> list[list[Any]]:
        """Compare a part of the stream, the `first` one or a later one, with the weights that are multiplied by.

        `names` are in the order of the stream, which a file does not keep.
        """
        if first or self.fp4rl_rows is None:
            self.fp4rl_rows = {}
        tensors = load_file(path)
        part = ((name, tensors[name]) for name in names)
        return [list(each) for each in held(self.model_runner.get_model(), part, self.fp4rl_rows)]


@dataclass
class Nothing(WeightTransferInitInfo):  # type: ignore[misc]
    """Files need no rendezvous."""


@dataclass
class File(WeightTransferUpdateInfo):  # type: ignore[misc]
    """A part of the weights: a safetensors file that the worker can read."""

    path: str


class FromFiles(WeightTransferEngine):  # type: ignore[misc]
    """vLLM's weight transfer by files, under the names of a checkpoint."""

    init_info_cls, update_info_cls = Nothing, File

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Keep all as it is."""

    def start_weight_update(self) -> None:
        """Begin to take weights as a checkpoint holds them."""
        begin_reload(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one file; without the synchronization of vLLM's own, which wants an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    @torch.no_grad()
    def receive_weights(self, update_info: File) -> None:
        """Load one file."""
        self.model.load_weights(load_file(update_info.path).items())

    def finish_weight_update(self) -> None:
        """Put the weights into the order of the kernels."""
        finalize_layerwise_reload(self.model, self.model_config)
        require_reloaded(self.model)
        follow_embeddings(self.model)

    def shutdown(self) -> None:
        """Keep all as it is."""


WeightTransferEngineFactory.register_engine(BACKEND, FromFiles)
