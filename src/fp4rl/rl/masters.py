"""FP32 masters of low-precision weights: the optimizer updates them, and the model computes with their rounding.

An AdamW update is about as large as the learning rate, and half a step of bfloat16 is 1/512 of a weight: at 1e-6 most
weights would never change. The model itself stays in its own dtype, so that quantizer, sampler, trainer and the saved
files have the same rounded weights; each update is made to the FP32 copy, which is then rounded into the model.

A weight that is clamped (`rl.clamp`) has a copy in any dtype: the model holds the clamped one, rounded to its dtype.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fp4rl.rl import processes
from fp4rl.rl.clamp import Clamp
from fp4rl.rl.sharding import local
from fp4rl.spec.errors import CheckFailed

FILE = "masters.safetensors"
_STRENGTH = "/strength"


class Masters:
    """Pairs of a trainable weight and its FP32 copy, for the weights of `model` that are not in float32, or clamped.

    `clamps` by the names of their weights; `clamp_lr` is the learning rate of their strengths. Gradients are summed in
    FP32 over micro-batches (and processes); those of the model are dropped.
    """

    def __init__(
        self, model: nn.Module, clamps: Mapping[str, Clamp] | None = None, clamp_lr: float | None = None
    ) -> None:
        self.clamps, self._clamp_lr = clamps or {}, clamp_lr
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._pairs = {
            name: (weight, nn.Parameter(weight.detach().to(torch.float32, copy=True)))
            for name, weight in trained.items()
            if weight.dtype != torch.float32 or name in self.clamps
        }
        self.sharded = any(isinstance(weight, DTensor) for weight, _ in self._pairs.values())
        self._others = [weight for name, weight in trained.items() if name not in self._pairs]

    @classmethod
    def of(cls, model: nn.Module) -> "Masters | None":
        """Make the masters of `model`; None where every trainable weight is in float32."""
        masters = cls(model)
        return masters if masters._pairs else None

    def parameters(self) -> Iterator[Tensor]:
        """Yield what the optimizer updates: the copies, the weights without one, and the strengths of clamps."""
        yield from (master for _, master in self._pairs.values())
        yield from self._others
        yield from (clamp.strength for clamp in self.clamps.values())

    def copies(self) -> dict[str, Tensor]:
        """Return the FP32 copies by the names of their weights."""
        return {name: master for name, (_, master) in self._pairs.items()}

    @torch.no_grad()
    def exact(self, name: str, weight: Tensor) -> Tensor:
        """Return in FP32 what a weight of the model is the rounding of: its copy, clamped; or the weight itself."""
        if name not in self._pairs:
            return weight.float()
        clamp, master = self.clamps.get(name), self._pairs[name][1]
        return master.detach() if clamp is None else clamp(master)

    def put_into(self, optimizer: torch.optim.Optimizer) -> None:
        """Replace the weights in a new optimizer by their copies."""
        copies = {id(weight): master for weight, master in self._pairs.values()}
        for group in optimizer.param_groups:
            group["params"] = [copies.get(id(weight), weight) for weight in group["params"]]
        if strengths := [clamp.strength for clamp in self.clamps.values()]:
            optimizer.add_param_group({"params": strengths, "lr": self._clamp_lr, "weight_decay": 0.0})

    def take_gradients(self, accelerator: Any) -> None:
        """Add the gradients of a micro-batch to those of the masters. With several processes, `accelerator` averages
        the sum over all but the last micro-batch of an update, which DDP has averaged itself, and FSDP2 all of them.
        After the last one, gradients of clamped weights become those of copies and strengths."""
        shared = accelerator.num_processes > 1 and accelerator.sync_gradients and not self.sharded
        for weight, master in self._pairs.values():
            if shared and master.grad is not None:
                master.grad = accelerator.reduce(master.grad, reduction="mean")
            if weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None
        for name, clamp in self.clamps.items() if accelerator.sync_gradients else ():
            master = self._pairs[name][1]
            if master.grad is not None:
                master.grad, clamp.strength.grad = clamp.gradients(master, master.grad)

    @property
    def _file(self) -> str:
        return f"{processes.rank()}-{FILE}" if self.sharded else FILE

    def drop_gradients(self) -> None:
        """Set all gradients to None, so that the next update changes nothing, not even by momentum."""
        for parameter in (*self.copies().values(), *(clamp.strength for clamp in self.clamps.values())):
            parameter.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Clamp and round the copies into the model's weights, after an update."""
        for name, (weight, _) in self._pairs.items():
            weight.copy_(self.exact(name, weight))
        self.drop_gradients()

    def save(self, folder: Path) -> None:
        """Save copies and strengths beside the model of a checkpoint; of sharded weights, the parts of this process."""
        copies = {name: local(master.detach()).contiguous() for name, (_, master) in self._pairs.items()}
        strengths = {name + _STRENGTH: clamp.strength.detach() for name, clamp in self.clamps.items()}
        save_file(copies | strengths, folder / self._file)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Load the copies of a checkpoint after its model. Raises CheckFailed where the model is not their rounding."""
        kept = load_file(folder / self._file)
        for name, clamp in self.clamps.items():
            clamp.strength.copy_(kept[name + _STRENGTH])
        for name, (weight, master) in self._pairs.items():
            local(master.detach()).copy_(kept[name])
            if not torch.equal(local(self.exact(name, weight)).to(weight.dtype), local(weight.detach())):
                raise CheckFailed(f"{folder}: {name} of the model is not its FP32 copy rounded; delete this checkpoint")
