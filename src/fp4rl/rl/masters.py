"""FP32 copies of low-precision weights, which the optimizer updates; the model computes with their rounding.

An AdamW update is about as large as the learning rate, and half a step of bfloat16 is 1/512 of a weight: at 1e-6 most
weights would never move. The model itself stays in its own dtype, so that the quantizer, the sampler, the trainer and
what is saved all see the same rounded weights; each update is made to the FP32 copy and rounded into the model once.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fp4rl.spec.errors import CheckFailed

FILE = "masters.safetensors"


class Masters:
    """Pairs of a trainable weight and its FP32 copy, for the weights of `model` that are not in float32 already.

    Gradients are added up in FP32 over micro-batches (and processes); those of the model are thrown away.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._pairs = {
            name: (weight, nn.Parameter(weight.detach().float()))
            for name, weight in trained.items()
            if weight.dtype != torch.float32
        }
        self._others = [weight for weight in trained.values() if weight.dtype == torch.float32]

    @classmethod
    def of(cls, model: nn.Module) -> "Masters | None":
        """None where every trainable weight of `model` is in float32."""
        masters = cls(model)
        return masters if masters._pairs else None

    def parameters(self) -> Iterator[Tensor]:
        """Yield what the optimizer updates: the copies, and the weights that need none."""
        yield from (master for _, master in self._pairs.values())
        yield from self._others

    def put_into(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a fresh optimizer of the model's weights update the copies in their place."""
        copies = {id(weight): master for weight, master in self._pairs.values()}
        for group in optimizer.param_groups:
            group["params"] = [copies.get(id(weight), weight) for weight in group["params"]]

    def take_gradients(self, accelerator: Any) -> None:
        """After the backward of a micro-batch. Of several processes the gradients of all but the last micro-batch of
        an update are their own: `accelerator` averages what was added up of them, as it did the last one itself."""
        shared = accelerator.num_processes > 1 and accelerator.sync_gradients
        for weight, master in self._pairs.values():
            if shared and master.grad is not None:
                master.grad = accelerator.reduce(master.grad, reduction="mean")
            if weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None

    def drop_gradients(self) -> None:
        """So that the update that follows moves nothing, not even by momentum."""
        for _, master in self._pairs.values():
            master.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """After an update: the model's weights are the rounded copies."""
        for weight, master in self._pairs.values():
            weight.copy_(master)
            master.grad = None

    def save(self, folder: Path) -> None:
        """Beside the model of a checkpoint."""
        save_file({name: master.detach() for name, (_, master) in self._pairs.items()}, folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """From a checkpoint whose model was loaded. Raises CheckFailed where that model is not the rounding of them."""
        kept = load_file(folder / FILE)
        for name, (weight, master) in self._pairs.items():
            master.copy_(kept[name])
            if not torch.equal(master.to(weight.dtype), weight):
                raise CheckFailed(f"{folder}: {name} of the model is not its FP32 copy rounded; delete this checkpoint")
