"""Hold one tiny architecture against the oracle, mode by mode, and say in a word what came of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import zoo_oracle as oracle
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fp4rl.inject.attach import Attachment, attach
from fp4rl.inject.plan import SitePlan
from fp4rl.inject.probe import require_rounded
from fp4rl.spec.errors import UserError
from fp4rl.spec.injection import Injection

IDS = torch.arange(3, 27).view(2, 12)
NOISE = 0.01
WEIGHTS = ("w4a16", "w4a8", "w4a4", "nvfp4_w4a16")
MODES = {mode: {"mode": mode} for mode in WEIGHTS} | {
    "kv_cache": {"kv_cache": "mxfp4"},
    "matmul noise": {"errors": [{"kind": "relative", "point": "matmul", "scale": NOISE}]},
}
EXACT = "exact"
TOLERANCE = 1e-6


def outcome(model: nn.Module, mode: str) -> str:
    """`exact`, or `refused: ` and the reason. AssertionError for anything else."""
    injection = Injection.model_validate({**MODES[mode], "dtype": "float32"})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = oracle.twin(model, oracle.MODES[mode]) if mode in oracle.MODES else None
    try:
        with attach(model, injection) as attachment:
            assert list(model.state_dict()) == list(before), "keys of the state dict changed"
            if twin is None:
                _hold_noise(model, attachment)
            else:
                _hold(model, attachment, mode, twin)
    except UserError as refusal:
        return f"refused: {refusal}"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "a master changed"
    return EXACT


def _hold(model: nn.Module, attachment: Attachment, mode: str, twin: nn.Module) -> None:
    """Logits, gradients and elements against the oracle's."""
    logits = _backward(model(IDS, use_cache=False).logits)
    attachment.require_calls()
    require_rounded(attachment)
    gradients = _gradients(model)
    _hold_elements(attachment)
    attachment.set_phase("reference")  # nothing acts there
    with torch.no_grad():
        plain = model(IDS, use_cache=False).logits
    cache = {"past_key_values": oracle.rounded_cache(model), "use_cache": True}
    wanted = _backward(twin(IDS, **cache if mode == "kv_cache" else {"use_cache": False}).logits)
    distance, effect = _relative(logits - wanted, wanted), _relative(plain - wanted, wanted)
    assert distance < TOLERANCE, f"{distance:.2g} off the oracle, where rounding makes {effect:.2g}"
    assert effect > 1e-3, f"rounding makes {effect:.2g}: nothing to be seen"
    if mode == "kv_cache":
        return  # the oracle's cache rounds without a gradient
    wanted_gradients = _gradients(twin)
    largest = max(found.norm() for found in wanted_gradients.values())
    for name, found in wanted_gradients.items():  # a key's bias has none but for rounding error
        bound = TOLERANCE * found.norm() + 1e-9 * largest
        assert (gradients[name] - found).norm() <= bound, f"the gradient of {name} is off"


def _hold_elements(attachment: Attachment) -> None:
    """Whole tensors were rounded: every weight as often as it was asked for, every input row in its full width."""
    plans = {plan.name: plan for plan in attachment.table.plans}
    for row in attachment.evidence():
        shape = plans[row.site].site.shape
        unit = {"weight": torch.Size(shape).numel(), "input": shape[-1] if shape else 1}.get(row.point, 1)
        assert row.elements, f"{row.site}: no {row.point} was rounded"
        assert row.elements % unit == 0, f"{row.site}: {row.elements} elements of {row.point} are no multiple of {unit}"


def _hold_noise(model: nn.Module, attachment: Attachment) -> None:
    """What each linear layer returns, over what it should: N(1, NOISE)."""
    with _products(model, attachment) as seen, torch.no_grad():
        model(IDS, use_cache=False)
    attachment.require_calls()
    met = [[path in seen for path in plan.site.places] for plan in _linear(attachment)]
    assert all(map(any, met))  # one weight may have a place in several layers
    for name, (x, weight, bias, found) in seen.items():
        clean = x @ weight.T
        found = found - (0 if bias is None else bias)
        some = clean != 0
        if not some.any():
            continue
        assert torch.equal(found[~some], clean[~some]), f"{name}: a relative error changes a zero"
        errors = found[some] / clean[some] - 1
        count = errors.numel()
        assert abs(errors.mean()) < 5 * NOISE / count**0.5, f"{name}: the noise has a mean of {errors.mean():.2g}"
        assert abs(errors.std() / NOISE - 1) < 5 / (2 * count) ** 0.5, f"{name}: its deviation is {errors.std():.3g}"


def _linear(attachment: Attachment) -> list[SitePlan]:
    """The sites with one product; those of stacked experts are held in tests/inject/test_expert_errors.py."""
    return [plan for plan in attachment.table.plans if plan.site.kind == "linear"]


@contextmanager
def _products(model: nn.Module, attachment: Attachment) -> Iterator[dict[str, tuple[Tensor, ...]]]:
    seen, handles = {}, []
    for path in (path for plan in _linear(attachment) for path in plan.site.places):
        module = model.get_submodule(path)

        def keep(module, given, found, name=path):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            seen[name] = (
                given[0].detach(),
                weight.detach(),
                module.bias,
                found.detach().clone(),
            )  # some add to it in place

        handles.append(module.register_forward_hook(keep))
    yield seen
    for handle in handles:
        handle.remove()


def _backward(logits: Tensor) -> Tensor:
    """Give every parameter the gradient of a loss that treats all logits alike; return them without their graph."""
    generator = torch.Generator().manual_seed(1)
    (logits * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum().backward()
    return logits.detach()


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those of every parameter that has one; they are taken away."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def _relative(difference: Tensor, whole: Tensor) -> float:
    return float(difference.norm() / whole.norm())
