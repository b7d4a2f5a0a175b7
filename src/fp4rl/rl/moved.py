"""What training made of the weights: how many it changed, start against end (P24), and a digest of what they are."""

import hashlib
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.evidence import WeightsMoved
from fp4rl.spec.model import Model

# Of weights that are updated in low precision most should move; in FP32 they need time to reach the next step.
_FEW, _HARDLY_ANY = 0.5, 0.05


@torch.no_grad()
def moved(start: PreTrainedModel, trained: PreTrainedModel, record: Callable[[WeightsMoved], None]) -> float:
    """The share of the trainable weights of `trained` that `start` holds in other bits; `record` hears it."""
    before = dict(start.named_parameters())
    changed = total = 0
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            old, new = _whole(before[name]), _whole(parameter)
            changed += int((new != old.to(new.device, new.dtype)).sum())
            total += new.numel()
    share = changed / total
    record(WeightsMoved(trainable=total, changed=changed, share=share))
    return share


@torch.no_grad()
def weights_digest(model: PreTrainedModel) -> str:
    """Twelve hex digits over the names and bits of the trainable weights: equal digests are equal policies (P48)."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = _whole(parameter).detach().contiguous().cpu()
            found.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
            found.update(whole.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:12]


def _whole(parameter: Tensor) -> Tensor:
    """A sharded parameter gathered, any other as it is."""
    return getattr(parameter, "full_tensor", parameter.detach)()


def without_update(steps: Collection[Mapping[str, float]]) -> int:
    """How many steps kept no group of answers, so that nothing was learned in them."""
    return sum(metrics.get("sampling/trained_groups") == 0 for metrics in steps)


def require_moved(share: float, steps: Collection[Mapping[str, float]], metric: str, dtype: str) -> None:
    """Raises CheckFailed for a training that changed nothing, with the likeliest reason: it is not a trained policy."""
    if share > 0:
        return
    if steps and without_update(steps) == len(steps):
        why = f"no step had a group of answers with spread in {metric} (training.filter_groups.metric, training.reward)"
    elif all(not metrics.get("grad_norm") for metrics in steps):
        why = "every gradient was 0: the answers of no group differ in their reward"
    else:
        why = f"no update reached half a step of {dtype}; raise training.lr"
    raise CheckFailed(f"training changed none of the weights: {why}")


def few_moved(share: float, model: Model) -> str | None:
    """One line for the reader when masters of low precision swallowed most updates; None when there is none to say."""
    enough = _FEW if model.coarse_masters else _HARDLY_ANY
    if model.dtype == "float32" or model.lora is not None or share >= enough:
        return None
    cure = "model.master_dtype: float32" if model.coarse_masters else "more steps"
    return (
        f"training changed {share:.2%} of the weights: most updates were smaller than half a step of {model.dtype}; "
        f"take {cure}, or a larger training.lr"
    )
