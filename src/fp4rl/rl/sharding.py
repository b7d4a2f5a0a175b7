"""FSDP2: every process holds its part of each weight, gradient and optimizer state, and gathers a layer to run it.

A model is sharded after adapters and injection, which round what is gathered, and before its optimizer is made.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fp4rl.inject.attach import Attachment
from fp4rl.rl import processes


def shard(model: Any) -> None:
    """Split a model over all processes: each of its layers by itself, and the rest as one.

    Everything is sharded again after a forward: weights change between two of them, by noise also without a backward.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    mesh = init_device_mesh(processes.device().type, (processes.count(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # of sums of gradients; weights stay as they are
    whole = set(getattr(inner, "_no_split_modules", None) or ())
    for layer in [module for module in inner.modules() if type(module).__name__ in whole]:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model._is_accelerate_prepared = True  # accelerate would put DDP around it


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` was called on the model."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole(model: nn.Module, attachment: Attachment | None) -> Iterator[None]:
    """Hold all weights of a sharded model whole in every process inside the `with`; of another, change nothing.

    Answers are sampled so: processes need different numbers of forwards, which cannot wait for each other. Rounded
    copies are kept meanwhile.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    states = list(attachment.states.values()) if attachment is not None and parts else []
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    for state in states:
        state.keep_copies = True
    try:
        yield
    finally:
        for state in states:
            state.keep_copies = False
            state.forget()
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def gathered_in_turn(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a sharded model as `named_modules` does, each while its own weights are whole."""
    held: list[tuple[str, FSDPModule]] = []
    try:
        for path, module in model.named_modules():
            if isinstance(module, FSDPModule):
                while held and not f"{path}.".startswith(f"{held[-1][0]}." if held[-1][0] else ""):
                    held.pop()[1].reshard()
                module.unshard()
                held.append((path, module))
            yield path, module
    finally:
        for _, part in held:
            part.reshard()


@torch.no_grad()
def gathered(model: nn.Module) -> dict[str, Tensor] | None:
    """Return the state dict of a sharded model with whole tensors, in the first process (empty in the others), and None
    for any other. Of a model with adapters it has the trained weights alone. To be called by all processes."""
    if not is_sharded(model):
        return None
    only_trained, state, met = hasattr(model, "peft_config"), dict[str, Tensor](), dict[int, Tensor]()
    for name, value in model.state_dict(keep_vars=True).items():
        if only_trained and not value.requires_grad:
            continue
        if id(value) not in met:  # a weight that is held under two names stays one tensor
            met[id(value)] = value.full_tensor().cpu() if isinstance(value, DTensor) else value.detach()
            if not processes.is_first():
                met[id(value)] = torch.empty(0)
        state[name] = met[id(value)]
    return state


def local(value: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, and any other as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


class CheckpointsInParts:
    """Checkpoints of a `Trainer` of transformers, which comes after this among the bases: of a sharded model each
    process writes and reads its own part of the trained weights and of the optimizer's states."""

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def _save(self, *args: Any, **named: Any) -> None:
        if not is_sharded(self.model):
            super()._save(*args, **named)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        state = self.optimizer.state_dict()
        moments = {at: {key: _local_of(value) for key, value in kept.items()} for at, kept in state["state"].items()}
        content = {
            "weights": {name: local(weight.detach()) for name, weight in _trained(self.model)},
            "optimizer": {**state, "state": moments},
            "scheduler": self.lr_scheduler.state_dict(),
        }
        torch.save(content, _file(output_dir))

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not is_sharded(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        kept = torch.load(_file(resume_from_checkpoint), weights_only=True)["weights"]
        for name, weight in _trained(self.model):
            local(weight.detach()).copy_(kept[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        kept = torch.load(_file(checkpoint), weights_only=True)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        state = kept["optimizer"]
        placed = {at: _placed(moments, weights[at]) for at, moments in state["state"].items()}
        self.optimizer.load_state_dict({**state, "state": placed})
        self.lr_scheduler.load_state_dict(kept["scheduler"])


def _file(folder: str) -> Path:
    return Path(folder) / f"part-{processes.rank()}.pt"


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def _local_of(value: Any) -> Any:
    return local(value) if isinstance(value, Tensor) else value


def _placed(moments: Mapping[str, Any], weight: Tensor) -> dict[str, Any]:
    """Return the states of one weight, sharded as the weight is where they have its shape."""
    if not isinstance(weight, DTensor):
        return dict(moments)
    mesh, placements, shape, stride = weight.device_mesh, weight.placements, weight.shape, weight.stride()

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=stride)

    return {key: placed(value) for key, value in moments.items()}
