"""Whether the processes of one run train one policy: the same weights and injection, and gradients that are averaged.

Everything here is called by all of them, and what one finds is raised in all: one that went on would wait for ever.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fp4rl.inject.attach import Attachment
from fp4rl.rl import processes
from fp4rl.rl.sharding import local
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.evidence import Injected

_SAMPLE = 4096  # values of each gradient that are compared
# Relative distances of averaged gradients: sums in another order in float32, and averages that are rounded to 16 bits.
_FLOAT, _HALF = 1e-3, 3e-2


def require_alike(value: str, what: str) -> None:
    """Raise CheckFailed unless `value` is the same in all processes."""
    each = processes.from_all(value)
    if len(set(each)) > 1:
        named = ", ".join(f"process {rank}: {own}" for rank, own in enumerate(each))
        raise CheckFailed(f"{what} differ between the processes, which would not train one policy ({named})")


def require_averaged(wrapped: Any, model: nn.Module) -> None:
    """Compare gradients of different tokens in each process, averaged by `wrapped`, with the mean of what the same
    tokens give where all processes have them. Raises CheckFailed; the model is left without gradients."""
    count, rank = processes.count(), processes.rank()
    mixed = _gradients(wrapped, model, min(rank, 1))  # the first process has other tokens than the rest
    first, other = _gradients(wrapped, model, 0), _gradients(wrapped, model, 1)
    mean = [(a + (count - 1) * b) / count for a, b in zip(first, other, strict=True)]
    wrong, size = _norm([a - b for a, b in zip(mixed, mean, strict=True)]), _norm(mean)
    coarse = any(p.dtype != torch.float32 for p in model.parameters() if p.requires_grad)
    far = processes.from_all(wrong / size if size else wrong)
    bad = [at for at, distance in enumerate(far) if not distance < (_HALF if coarse else _FLOAT)]
    if bad:
        raise CheckFailed(
            f"gradients are not averaged over the processes: in process {bad[0]} they are {far[bad[0]]:.1%} away from "
            "the mean of all; each would train a policy of its own"
        )


def _gradients(wrapped: Any, model: Any, which: int) -> list[Tensor]:
    """Return a sample of each weight's gradient (of this process's part of it) for a few tokens."""
    device = next(model.parameters()).device
    ids = (torch.arange(1, 17, device=device) * (1 + 2 * which)) % model.config.get_text_config().vocab_size
    wrapped(input_ids=ids.unsqueeze(0), use_cache=False).logits.float().square().mean().backward()
    gradients = [local(weight.grad).flatten() for weight in model.parameters() if weight.grad is not None]
    samples = [g[:: max(1, g.numel() // _SAMPLE)][:_SAMPLE].float() for g in gradients]
    model.zero_grad(set_to_none=True)
    return samples


def _norm(parts: list[Tensor]) -> float:
    return float(sum(float(part.double().square().sum()) for part in parts) ** 0.5)


def evidence_of_all(attachment: Attachment) -> tuple[list[Injected], list[list[Injected]]]:
    """Return the counters of all processes added up, and those of each. Raises CheckFailed, naming the process, for a
    point that acted in one and not in another."""
    each = processes.from_all(attachment.evidence())
    if len(each) == 1:
        return each[0], each
    points = [{(row.phase, row.site, row.point) for row in rows if row.calls} for rows in each]
    for rank, own in enumerate(points):
        if missing := set.union(*points) - own:
            phase, site, point = min(missing)
            raise CheckFailed(f"process {rank} did not round {site} ({point}) during {phase}, and others did")
    own_state = attachment.state_dict()
    states = processes.from_all(own_state)
    summed = {
        name: {**state, "meters": _added([s[name]["meters"] for s in states])} for name, state in own_state.items()
    }
    attachment.load_state_dict(summed)
    rows = attachment.evidence()
    attachment.load_state_dict(own_state)
    return rows, each


def _added(meters: list[list[Any]]) -> list[Any]:
    """Add up the counters [phase, point, stage, numbers...] of the same site in several processes."""
    sums: dict[tuple[str, ...], list[float]] = {}
    for *key, numbers in ((*meter[:3], meter[3:]) for of_one in meters for meter in of_one):
        known = sums.get(tuple(key), [0] * len(numbers))
        sums[tuple(key)] = [a + b for a, b in zip(known, numbers, strict=True)]
    return [[*key, *numbers] for key, numbers in sums.items()]
