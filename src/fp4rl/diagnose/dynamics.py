"""How every layer responds to small changes of its input, all layers in one forward pass: features that show faults."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from fp4rl.diagnose.calibration import Batch, Calibration
from fp4rl.diagnose.depth import layer_paths
from fp4rl.diagnose.passes import logits_of
from fp4rl.diagnose.probes import STEP, Probe, probe
from fp4rl.inject.plan import SiteTable
from fp4rl.sites.observe import Eye, first_tensor, hooked, real_tokens

# Tokens of each linear layer and texts of each decoder layer that are probed in a batch: enough to show a fault, and
# cheaper than the forward pass itself.
PROBED_TOKENS = 32
PROBED_TEXTS = 1


@dataclass(frozen=True)
class LayerDynamics:
    """One decoder layer, attention included. Its input is perturbed by noise of 2 % of the stream's root mean square.

    `gain`: standard deviation of the response over that of the perturbation, `min_gain` and `max_gain` that of single
    tokens. `kurtosis`: excess kurtosis of the output, `kurtosis_jump`: its growth over the layer before.
    `instability`: relative difference of two identical calls.
    """

    layer: int
    gain: float
    min_gain: float
    max_gain: float
    kurtosis: float
    kurtosis_jump: float
    instability: float


@dataclass(frozen=True)
class Dynamics:
    """Features of every decoder layer but those `skipped`, and the probes of linear layers by site name."""

    layers: tuple[LayerDynamics, ...]
    sites: Mapping[str, Probe]
    site_layers: Mapping[str, int | None]
    tokens: int
    skipped: tuple[int, ...] = ()


def dynamics(
    model: nn.Module,
    table: SiteTable,
    calibration: Calibration,
    *,
    generator: torch.Generator,
    batches: int = 1,
    probed: bool = True,
) -> Dynamics:
    """Measure features of all layers in one forward pass per batch, over the calibration's last (longest) `batches`.

    During the pass each layer is called again with its own input, slightly changed; only sums are kept. The model is
    not changed. Features are averaged over batches; of the extreme gains the extremes are taken. Linear layers are
    probed only with `probed`.
    """
    sites = {plan.name: plan.site for plan in table.plans if probed and plan.site.kind == "linear"}
    seen = _Seen(_own_stream(generator))
    for batch in calibration.batches[-batches:]:
        hooks = {path: seen.site_hook(name) for name, site in sites.items() for path in site.places}
        hooks |= {path: seen.layer_hook(number, batch) for path, number in layer_paths(table).items()}
        with hooked(model, hooks), torch.no_grad():
            seen.eye.mask = batch.mask
            logits_of(model, batch)
            seen.eye.forget()
    probes = {name: _merged(moments) for name, moments in seen.sites.items()}
    tokens = sum(int(batch.mask.sum()) for batch in calibration.batches[-batches:])
    layers, of_sites = tuple(_with_jumps(seen.layers)), {name: sites[name].layer for name in probes}
    return Dynamics(layers, probes, of_sites, tokens, tuple(sorted(seen.skipped)))


def _own_stream(generator: torch.Generator) -> torch.Generator:
    """Return a generator with a stream of its own: noise and weights both from seed 0 would be correlated, and the
    response would look like spikes."""
    drawn = int(torch.randint(2**62, (), generator=generator, device=generator.device).item())
    seed = hashlib.blake2b(f"probe {drawn}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)


def ratios(full: Dynamics, injected: Dynamics) -> dict[int, dict[str, float]]:
    """Return layer -> `gain_ratio` and `kurtosis_ratio` of the injected model to the unchanged one."""
    before = {layer.layer: layer for layer in full.layers}
    return {
        layer.layer: {
            "gain_ratio": layer.gain / before[layer.layer].gain,
            # The ratio of plain kurtosis (3 for Gaussian data), since excess kurtosis is about zero.
            "kurtosis_ratio": (layer.kurtosis + 3) / (before[layer.layer].kurtosis + 3),
        }
        for layer in injected.layers
        if layer.layer in before
    }


class _Seen:
    """Collects what the hooks of one pass measure; calls that a hook makes itself are not measured again."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.eye = Eye()
        self.sites: dict[str, list[Probe]] = {}
        self.layers: dict[int, list[tuple[Tensor, Tensor, float]]] = {}
        self.skipped: set[int] = set()
        self._busy = False

    def site_hook(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Linear, args: tuple[Tensor, ...], _kwargs: dict[str, Any], _output: Tensor) -> None:
            if not self._busy:
                self._busy = True
                tokens = self.eye.tokens(args[0])
                every = max(1, len(tokens) // PROBED_TOKENS)
                self.sites.setdefault(name, []).append(probe(layer, tokens[::every][:PROBED_TOKENS], self.generator))
                self._busy = False

        return hook

    def layer_hook(self, number: int, batch: Batch) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._busy:
                return
            hidden, out = first_tensor(args), first_tensor(output)
            tokens = None if out is None else real_tokens(out, batch.mask)
            if tokens is None or hidden is None or real_tokens(hidden, batch.mask) is None:
                self.skipped.add(number)
                return
            self._busy = True
            response = self._response(layer, (args, kwargs), hidden, batch.mask)
            self.layers.setdefault(number, []).append((power_sums(tokens), *response))
            self._busy = False

        return hook

    def _response(
        self, layer: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]], hidden: Tensor, mask: Tensor
    ) -> tuple[Tensor, float]:
        """Return the gain of each token of the probed texts [tokens], and the relative difference of equal calls."""
        texts = len(mask) if hidden.shape[:2] == mask.shape else -1  # else all of them: no axis is cut
        args, kwargs = some_texts(given, texts)
        hidden, mask = some_texts(hidden, texts), some_texts(mask, texts)

        def real(value: Tensor) -> Tensor:
            tokens = real_tokens(value, mask)
            assert tokens is not None
            return tokens.double()

        change = torch.randn(hidden.shape, generator=self.generator, dtype=torch.float32).to(hidden.device)
        shifted = (hidden.float() + STEP * float(real(hidden).square().mean().sqrt()) * change).to(hidden.dtype)
        changed, once, again = (real(_called(layer, value, args, kwargs)) for value in (shifted, hidden, hidden))
        came, went = changed - once, real(shifted - hidden)
        gains = came.std(-1, correction=0) / went.std(-1, correction=0)
        return gains, float((again - once).square().mean().sqrt() / once.square().mean().sqrt())


def _called(layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    output = first_tensor(layer(hidden, *args[1:], **kwargs))
    assert output is not None
    return output


def some_texts(value: Any, texts: int) -> Any:
    """Return the last `texts` of a layer's argument: of every tensor [texts, ...], in tuples and mappings too.

    One-dimensional tensors are left as they are: their axis counts tokens, even where there are as many as texts.
    """
    if isinstance(value, Tensor):
        return value[-PROBED_TEXTS:] if value.dim() > 1 and len(value) == texts else value
    if isinstance(value, tuple):
        return tuple(some_texts(part, texts) for part in value)
    if isinstance(value, dict):
        return {key: some_texts(part, texts) for key, part in value.items()}
    return value


def _merged(probes: list[Probe]) -> Probe:
    """Average probes over batches; of minima and maxima take the extremes."""
    choose: dict[str, Callable[[list[float]], float]] = {"min_gain": min, "max_gain": max}
    names = [field.name for field in fields(Probe)]
    return Probe(*(choose.get(name, _mean)([getattr(each, name) for each in probes]) for name in names))


def power_sums(values: Tensor) -> Tensor:
    """Return sum(x^k) for k = 0 to 4, float64 [5]; sums of pieces add up to those of the whole."""
    exact = values.detach().double()
    return torch.stack([(exact**k).sum() for k in range(5)]).cpu()


def excess_kurtosis(sums: Tensor) -> float:
    """Return the excess kurtosis by power sums: 0 for Gaussian values, NaN for constant ones."""
    _, mean, second, third, fourth = (sums / sums[0]).tolist()
    variance = second - mean**2
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    return central / variance**2 - 3 if variance > 0 else nan


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _with_jumps(layers: dict[int, list[tuple[Tensor, Tensor, float]]]) -> list[LayerDynamics]:
    rows: list[LayerDynamics] = []
    for number, batches in sorted(layers.items()):
        gains = torch.cat([gains for _, gains, _ in batches])
        kurtosis = excess_kurtosis(torch.stack([sums for sums, _, _ in batches]).sum(0))
        jump = kurtosis - rows[-1].kurtosis if rows else 0.0
        gain = float(gains.square().mean().sqrt())
        unstable = max(unstable for _, _, unstable in batches)
        rows.append(LayerDynamics(number, gain, float(gains.min()), float(gains.max()), kurtosis, jump, unstable))
    return rows
