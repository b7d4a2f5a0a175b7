"""Noise on weights inside a `with`, and the exact bits back afterwards.

Where noise goes on linear weights under injection (`targets.kinds` holds `linear`), the caller must also call
`Attachment.invalidate()` on the way in and on the way out: the rounded copies were made from other weights.
"""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fp4rl.noise.evidence import NoiseEvidence
from fp4rl.noise.targets import NoisyWeight, no_noise_on_codes, noisy_weights
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.noise import Noise


@contextmanager
def perturb(
    model: nn.Module,
    noise: Noise,
    sigma: float,
    *,
    generator: torch.Generator,
    share: float | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[list[NoiseEvidence]]:
    """Put noise of standard deviation `sigma` x multiplier on the weights that `noise` names; yields the evidence.

    One number is drawn from `generator`; each weight's noise follows from it and the weight's name, whatever the order,
    the sharding or the process. `share` is the part of the run that is done (zones that change need it). `dtype` is
    what a model computes in whose weights are FP32 masters: noise goes on their copies in it. Raises InvalidValueError
    for a negative sigma and a packed weight, NotFoundError when nothing takes noise, CheckFailed when a weight lost it.
    """
    if not 0 <= sigma < float("inf"):
        raise InvalidValueError(f"sigma is {sigma}; noise needs a finite standard deviation from 0 up")
    weights = noisy_weights(model, noise, share=share)
    seed = draw_seed(generator)
    evidence: list[NoiseEvidence] = []
    with ExitStack() as undo:
        for weight in weights:
            clean = _full(weight.parameter)
            if clean.is_meta:
                raise InvalidValueError(no_noise_on_codes(weight.name))
            clean = clean.to(dtype or clean.dtype)
            clean_factors = weight.gauge.factors(clean) if weight.gauge is not None else None
            noisy, record = noisy_copy(weight, clean, noise, sigma, seed)
            undo.enter_context(_in_float32(weight, noisy) if noise.precision == "float32" else _written(weight, noisy))
            now = _full(weight.parameter).detach().nan_to_num().to(noisy.dtype)
            if noise.precision == "weight" and not torch.equal(now, noisy.nan_to_num()):
                raise CheckFailed(f"{weight.name} does not hold the noise that was drawn for it")
            evidence.append(_measured(weight, clean_factors, noise, record))
        yield evidence


def draw_seed(generator: torch.Generator) -> int:
    """Draw one number from the generator, from which the noise of all weights follows."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device).item())


def standard_noise(seed: int, name: str, shape: torch.Size) -> Tensor:
    """Draw standard normal noise [shape], FP32, on the CPU: the same numbers whatever device the weight is on."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    own = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=own, dtype=torch.float32)


def noisy_copy(
    weight: NoisyWeight, clean: Tensor, noise: Noise, sigma: float, seed: int
) -> tuple[Tensor, NoiseEvidence]:
    """Return the noisy weight as a new tensor, in FP32 under `precision: float32` and in the weight's dtype otherwise.

    For sending named weights to another engine; `perturb` uses it too, so that both have the same numbers.
    """
    scaled_sigma = sigma * weight.multiplier
    exact = clean.detach().to(torch.promote_types(clean.dtype, torch.float32))
    drawn = scaled_sigma * standard_noise(seed, weight.name, clean.shape).to(exact.device)
    # Multiplicative noise is relative to what the layer multiplies by: 1 + w in a zero-centred norm.
    noisy = exact + drawn if noise.operation == "additive" else (exact + weight.offset) * (1 + drawn) - weight.offset
    if noise.precision == "weight":
        noisy = noisy.to(clean.dtype)
    record = NoiseEvidence(
        name=weight.name,
        kind=weight.kind,
        layer=weight.layer,
        multiplier=weight.multiplier,
        sigma=scaled_sigma,
        drawn=float(drawn.square().mean().sqrt()),
        realised=_realised(noisy.to(exact.dtype) + weight.offset, exact + weight.offset, noise.operation),
        share_changed=float((noisy.to(exact.dtype) != exact).double().mean()),
        elements=clean.numel(),
    )
    return noisy, record


def _realised(noisy: Tensor, clean: Tensor, operation: str) -> float:
    change = noisy - clean
    if operation == "multiplicative":
        change = (change / clean)[clean != 0]
    return float(change.double().square().mean().sqrt()) if change.numel() else 0.0


def _measured(weight: NoisyWeight, clean: Tensor | None, noise: Noise, record: NoiseEvidence) -> NoiseEvidence:
    """Return the record with the change of a norm's output in it; CheckFailed where it is not what the weight holds."""
    if weight.gauge is None or clean is None:
        return record
    live = noise.precision == "float32"
    now = weight.gauge.live_factors(weight.module) if live else weight.gauge.factors(_full(weight.parameter))
    realised = _realised(now, clean, noise.operation)
    if abs(realised - record.realised) > 1e-6 + 1e-3 * record.realised:
        raise CheckFailed(
            f"{weight.name} holds noise of {record.realised:.3g}, but its norm's output changes by {realised:.3g}"
        )
    return replace(record, realised=realised)


def _full(parameter: nn.Parameter) -> Tensor:
    """Return a gathered copy of a sharded parameter, the parameter itself otherwise."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@contextmanager
def _written(weight: NoisyWeight, noisy: Tensor) -> Iterator[None]:
    """Write in place, so that autograd notices a graph that was built on clean weights and is used under noise."""
    parameter: Any = weight.parameter
    kept, written = parameter.detach().clone(), noisy
    if isinstance(parameter, DTensor):
        written = distribute_tensor(noisy, parameter.device_mesh, parameter.placements)
    try:
        with torch.no_grad():
            parameter.copy_(written)
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


@contextmanager
def _in_float32(weight: NoisyWeight, noisy: Tensor) -> Iterator[None]:
    """Let an FP32 copy of the norm compute with the noisy weight; no weight is written."""
    module, twin = weight.module, copy.deepcopy(weight.module).float()
    twin.register_parameter("weight", nn.Parameter(noisy, requires_grad=False))
    before = module.__dict__.get("forward")

    def forward(hidden: Tensor, *gate: Any, **named: Any) -> Tensor:
        computed: Tensor = twin.forward(hidden.float(), *gate, **named)
        return computed.to(hidden.dtype)

    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
