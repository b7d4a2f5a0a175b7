"""What the formats of a site cost where it is deployed: bits of its weights, and time of its matmul by peak rates.

A matmul runs at the rate of its wider operand: MXFP4 weights times MXFP8 inputs (W4A8) at that of 8 bits. Input blocks
that are rounded twice are multiplied twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from fp4rl.inject.plan import SitePlan
from fp4rl.spec.deployment import deployment_named
from fp4rl.spec.formats import MXFP8, Format
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import MODES

# Kernel -> dense peak rates by bits of the wider operand, in PFLOPS, and where they are published.
_B200 = ({4: 9.0, 8: 4.5, 16: 2.25}, "NVIDIA's table of HGX B200, dense")
_ASCEND_950 = ({4: 2.0, 8: 1.0}, "Huawei's announcement of Ascend 950PR, September 2025")
PEAKS: Mapping[str, tuple[Mapping[int, float], str]] = {
    "vllm_blackwell": _B200,
    "vllm_ascend": _ASCEND_950,
    "vllm_ascend_dual": _ASCEND_950,
    "vllm_ascend_dual_64": _ASCEND_950,
    "cann": _ASCEND_950,
}


@dataclass(frozen=True)
class Pair:
    """Formats of a site's weight and of the input of its matmul; None rounds nothing and computes in 16 bits."""

    weight: Format | None
    input: Format | None

    @property
    def name(self) -> str:
        """As reasons say it: `mxfp4 weights x mxfp8 inputs`."""
        return " x ".join(
            f"{fmt.name if fmt else 'bf16'} {what}s" for fmt, what in ((self.weight, "weight"), (self.input, "input"))
        )

    @property
    def weight_bits(self) -> float:
        """Bits of a weight, its share of the scales included."""
        return self.weight.bits_per_value if self.weight is not None else 16.0

    @property
    def operand_bits(self) -> int:
        """Bits of the wider operand, as matmuls are built: 4, 8 or 16."""
        widest = max(int(fmt.bits_once) if fmt is not None else 16 for fmt in (self.weight, self.input))
        return next(bits for bits in (4, 8, 16) if widest <= bits)


def pairs_of(injection: Injection) -> tuple[Pair, ...]:
    """Return what a site may have: as scanned, wider inputs, MXFP8 for both, and BF16."""
    weight, given = injection.weight, injection.input
    inputs = [] if given is None else [Pair(weight, MXFP8), Pair(weight, None)]
    if given is not None and given.bits_per_value >= MXFP8.bits_per_value:
        inputs = inputs[1:]
    return (Pair(weight, given), *inputs, Pair(MXFP8, given and MXFP8), Pair(None, None))


def computes(deployment: str | None, pair: Pair, plan: SitePlan) -> bool:
    """Return whether the deployment computes a site in the mode with these formats; any does where none is named."""
    if deployment is None:
        return True
    names = tuple(fmt and fmt.name for fmt in (pair.weight, pair.input))
    modes = (m.name for m in MODES.values() if names == (m.weight and m.weight.name, m.input and m.input.name))
    for mode in modes:
        served = deployment_named(deployment).served(mode)
        if served is not None and served.mode == mode:
            fits = plan.site.shape[-1] % served.multiple_of == 0
            return fits and (not served.experts_alone or len(plan.site.shape) > 2)
    return False


@dataclass(frozen=True)
class Prices:
    """Prices of sites in bits of all their weights.

    (1 - compute) of a price is the weights' own bits; `compute` of it is the time of the matmul in units of its time as
    scanned, times the weights' bits as scanned, so that all sites as scanned cost these bits. `macs`: site -> its share
    of the multiplications of a token; `columns`: -> its in_features.
    """

    scanned: Pair
    compute: float
    deployment: str | None
    macs: Mapping[str, float]
    sizes: Mapping[str, int]
    columns: Mapping[str, int]

    @property
    def total(self) -> int:
        """The number of weights."""
        return sum(self.sizes.values())

    def of(self, pair: Pair, site: str) -> float:
        """Return the price of one site."""
        weights = self.sizes[site] * pair.weight_bits
        matmul = self.total * self.macs[site] * self.scanned.weight_bits * self.slowdown(pair, site)
        return (1 - self.compute) * weights + self.compute * matmul

    def slowdown(self, pair: Pair, site: str) -> float:
        """Return how many times as long the matmul of a site takes as it does as scanned."""
        peaks, _ = self._peaks
        now, then = pair.operand_bits, self.scanned.operand_bits
        rate = peaks[then] / peaks[now] if {now, then} <= peaks.keys() else now / then
        passes = [fmt.passes(self.columns[site]) if fmt is not None else 1 for fmt in (pair.input, self.scanned.input)]
        return rate * passes[0] / passes[1]

    @property
    def source(self) -> str:
        """Where the rates are from."""
        known, where = self._peaks
        unknown = [str(bits) for bits in (4, 8, 16) if bits not in known]
        return f"{where}{f'; of {unknown[0]} bits by their number' if known and unknown else ''}"

    @property
    def _peaks(self) -> tuple[Mapping[int, float], str]:
        kernel = deployment_named(self.deployment).kernel.name if self.deployment else ""
        return PEAKS.get(kernel, ({}, "bits of the wider operand, since no peak rates are known"))


def prices_of(model: nn.Module, plans: Sequence[SitePlan], injection: Injection, compute: float) -> Prices:
    """Return the prices of the sites of `plans`; without rounded inputs they are bits of weights alone."""
    sizes = {plan.name: prod(plan.site.shape) for plan in plans}
    macs = {plan.name: sizes[plan.name] * _active(model, plan) for plan in plans}
    shares = {name: each / sum(macs.values()) for name, each in macs.items()}
    scanned = Pair(injection.weight, injection.input)
    columns = {plan.name: plan.site.shape[-1] for plan in plans}
    share = compute if injection.input is not None else 0.0
    return Prices(scanned, share, injection.deployment, shares, sizes, columns)


def _active(model: nn.Module, plan: SitePlan) -> float:
    """Return the share of a stack's experts that a token is sent to; 1 for a dense layer, or where it is not known."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if config is not None else None
    chosen = getattr(config, "num_experts_per_tok", None)
    return min(1.0, chosen / plan.site.shape[0]) if chosen and len(plan.site.shape) > 2 else 1.0
