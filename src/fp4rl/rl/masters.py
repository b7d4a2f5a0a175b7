"""FP32 masters of low-precision weights: the optimizer updates them, and the model computes with their rounding.

An AdamW update is about as large as the learning rate, and half a step of bfloat16 is 1/512 of a weight: at 1e-6 most
weights would never change. The model itself stays in its own dtype, so that quantizer, sampler, trainer and the saved
files have the same rounded weights; each update is made to the FP32 copy, which is then rounded into the model.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fp4rl.rl import processes
from fp4rl.rl.sharding import local
from fp4rl.spec.errors import CheckFailed

FILE = "masters.safetensors"


class Masters:
    """Pairs of a trainable weight and its FP32 copy, for the weights of `model` that are not in float32.

    Gradients are summed in FP32 over micro-batches (and processes); those of the model are dropped.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._pairs = {
            name: (weight, nn.Parameter(weight.detach().float()))
            for name, weight in trained.items()
            if weight.dtype != torch.float32
        }
        self.sharded = any(isinstance(weight, DTensor) for weight, _ in self._pairs.values())
        self._others = [weight for weight in trained.values() if weight.dtype == torch.float32]

    @classmethod
    def of(cls, model: nn.Module) -> "Masters | None":
        """Make the masters of `model`; None where every trainable weight is in float32."""
        masters = cls(model)
        return masters if masters._pairs else None

    def parameters(self) -> Iterator[Tensor]:
        """Yield what the optimizer updates: the copies, and the weights without one."""
        yield from (master for _, master in self._pairs.values())
        yield from self._others

    def copies(self) -> dict[str, Tensor]:
        """Return the FP32 copies by the names of their weights."""
        return {name: master for name, (_, master) in self._pairs.items()}

    def put_into(self, optimizer: torch.optim.Optimizer) -> None:
        """Replace the weights in a new optimizer by their copies."""
        copies = {id(weight): master for weight, master in self._pairs.values()}
        for group in optimizer.param_groups:
            group["params"] = [copies.get(id(weight), weight) for weight in group["params"]]

    def take_gradients(self, accelerator: Any) -> None:
        """Add the gradients of a micro-batch to those of the masters. With several processes, `accelerator` averages
        the sum over all but the last micro-batch of an update, which DDP has averaged itself, and FSDP2 all of them."""
        shared = accelerator.num_processes > 1 and accelerator.sync_gradients and not self.sharded
        for weight, master in self._pairs.values():
            if shared and master.grad is not None:
                master.grad = accelerator.reduce(master.grad, reduction="mean")
            if weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None

    @property
    def _file(self) -> str:
        return f"{processes.rank()}-{FILE}" if self.sharded else FILE

    def drop_gradients(self) -> None:
        """Set all gradients to None, so that the next update changes nothing, not even by momentum."""
        for _, master in self._pairs.values():
            master.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Round the copies into the model's weights, after an update."""
        for weight, master in self._pairs.values():
            weight.copy_(master)
            master.grad = None

    def save(self, folder: Path) -> None:
        """Save the copies beside the model of a checkpoint; of sharded weights, the parts of this process."""
        copies = {name: local(master.detach()).contiguous() for name, (_, master) in self._pairs.items()}
        save_file(copies, folder / self._file)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Load the copies of a checkpoint after its model. Raises CheckFailed where the model is not their rounding."""
        kept = load_file(folder / self._file)
        for name, (weight, master) in self._pairs.items():
            own = local(master.detach())
            own.copy_(kept[name])
            if not torch.equal(own.to(weight.dtype), local(weight.detach())):
                raise CheckFailed(f"{folder}: {name} of the model is not its FP32 copy rounded; delete this checkpoint")
