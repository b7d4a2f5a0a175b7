"""Weights that hop between neighbouring codes, measured after every update and held back (Nagel et al. 2022, arXiv
2203.11086).

The level of a weight is its code as a number, in units of its block's scale. It flips where an update gives it another
level, and turns where a flip goes the other way than the one before. The frequency of turns is a running mean.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp4rl.inject.attach import Attachment
from fp4rl.inject.linear import LinearState
from fp4rl.numerics.rounding import round_magnitude
from fp4rl.rl.deployed import Deployed
from fp4rl.rl.masters import Masters
from fp4rl.rl.phases import Phases
from fp4rl.spec.evidence import Oscillated
from fp4rl.spec.formats import Element
from fp4rl.spec.oscillation import Oscillation

FILE = "oscillation.safetensors"
OFTEN = 0.005  # the frequency from which the paper counts a weight as one that oscillates


@dataclass(frozen=True)
class Watched:
    """A trained weight that is rounded: the model's own, and `exact`, what the optimizer updates (maybe the same)."""

    state: LinearState
    weight: Tensor
    exact: Tensor

    @property
    def element(self) -> Element:
        """The element of its format."""
        assert self.state.plan.weight is not None
        return self.state.plan.weight.element

    def levels(self) -> tuple[Tensor, Tensor]:
        """Return the present levels and the scales they are multiplied by, as the weight is stored."""
        level, scale = self.state.levels(self.state.as_used(self.weight))
        return self.state.as_used(level).contiguous(), self.state.as_used(scale).contiguous()

    def put(self, values: Tensor, where: Tensor) -> None:
        """Write values into the weights of a mask."""
        self.exact.copy_(torch.where(where, values, self.exact))
        if self.exact is not self.weight:
            self.weight.copy_(self.exact)


def watched_weights(attachment: Attachment, masters: Masters | None) -> dict[str, Watched]:
    """Return the trained weights that are rounded under scales, by the names of the model's parameters."""
    names = {id(weight): name for name, weight in attachment.model.named_parameters()}
    copies = masters.copies() if masters is not None else {}
    watched = {}
    for state in attachment.states.values():
        if not isinstance(state, LinearState) or state.plan.weight is None or state.plan.weight.scale == "none":
            continue
        module = attachment.model.get_submodule(state.plan.site.path)
        weight = module._parameters[state.plan.site.parameter or "weight"]
        if weight is not None and weight.requires_grad:
            name = names[id(weight)]
            watched[name] = Watched(state, weight, copies.get(name, weight))
    return watched


@torch.no_grad()
def codes_unlike(attachment: Attachment, deployed: Deployed, phases: Phases) -> float:
    """Return the share of codes that the average, as it is deployed, has otherwise than the weights in training."""
    watched = watched_weights(attachment, None).values()
    trained = [each.levels()[0] for each in watched]
    with deployed.policy(), phases.reference("evaluation"):
        unlike = sum(int((each.levels()[0] != own).sum()) for each, own in zip(watched, trained, strict=True))
    return unlike / sum(own.numel() for own in trained)


class OscillationWatch:
    """Follows the codes of all trained weights that are rounded, by the names of the model's parameters.

    A weight costs 7 bytes, with `freeze` 12.
    """

    def __init__(self, attachment: Attachment, masters: Masters | None, settings: Oscillation) -> None:
        self.settings = settings
        self.watched = watched_weights(attachment, masters)
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.flips: dict[str, int] = dict.fromkeys(self.watched, 0)
        self.updates, self._distance = 0, 0.0

    @torch.no_grad()
    def before(self) -> None:
        """Take the first levels, once, and add the gradient of dampening to that of an update.

        Of the loss dampen * sum (W - Q(W))^2 over weights within their scale's reach, Q(W) a constant.
        """
        self._distance = 0.0
        if self.kept and not self.settings.dampen:
            return
        for name, watched in self.watched.items():
            level, scale = watched.levels()
            if name not in self.kept:
                self.kept[name] = self._first(level)
            if self.settings.dampen:
                away = watched.exact.detach() - level * scale
                away.masked_fill_(watched.exact.abs() > watched.element.largest * scale, 0)
                self._distance += float(away.square().sum())
                gradient = (2 * self.settings.dampen * away).to(watched.exact.dtype)
                watched.exact.grad = gradient if watched.exact.grad is None else watched.exact.grad.add_(gradient)

    def _first(self, level: Tensor) -> dict[str, Tensor]:
        kept = {"level": level.bfloat16(), "last": torch.zeros_like(level, dtype=torch.int8)}
        kept["frequency"] = torch.zeros_like(level, dtype=torch.float32)
        if self.settings.freeze is not None:
            kept |= {"mean": level.float(), "frozen": torch.zeros_like(level, dtype=torch.bool)}
        return kept

    @torch.no_grad()
    def after(self) -> dict[str, float]:
        """Compare the levels after an update with those before it, freeze what turns too often; return metrics."""
        self.updates += 1
        if self.settings.freeze is not None:  # all, before any level is taken: layers may share a factor
            for name, watched in self.watched.items():
                watched.put(self.kept[name]["mean"], self.kept[name]["frozen"])
        flips = {name: self._compared(name, watched) for name, watched in self.watched.items()}
        for name, count in flips.items():
            self.flips[name] += count
        weights = sum(watched.weight.numel() for watched in self.watched.values())
        kept = self.kept.values()
        metrics = {"weights/code_flips": sum(flips.values()) / weights}
        metrics["weights/oscillating"] = sum(int((each["frequency"] > OFTEN).sum()) for each in kept) / weights
        if self.settings.freeze is not None:
            metrics["weights/frozen"] = sum(int(each["frozen"].sum()) for each in kept) / weights
        if self.settings.dampen:
            metrics["weights/dampening"] = self.settings.dampen * self._distance
        return metrics

    def _compared(self, name: str, watched: Watched) -> int:
        kept, decay = self.kept[name], self.settings.decay
        level, scale = watched.levels()
        way = (level - kept["level"]).sign_().to(torch.int8)
        turned = (way != 0) & (way == -kept["last"])
        kept["frequency"].mul_(decay).add_(turned, alpha=1 - decay)
        kept["last"] = torch.where(way != 0, way, kept["last"])
        kept["level"] = level.bfloat16()
        if self.settings.freeze is not None:
            kept["mean"] = torch.where(kept["frozen"], kept["mean"], kept["mean"].lerp(level.float(), 1 - decay))
            new = ~kept["frozen"] & (kept["frequency"] > self.settings.freeze)
            mean = round_magnitude(kept["mean"].abs(), watched.element, "nearest_even").copysign_(kept["mean"])
            kept["mean"] = torch.where(new, mean * scale, kept["mean"])  # from here on the value itself
            kept["level"] = torch.where(new, mean.bfloat16(), kept["level"])
            kept["frozen"] |= new
            watched.put(kept["mean"], new)
        return int((way != 0).sum())

    def rows(self) -> Iterator[Oscillated]:
        """Yield the evidence of a whole run, a row for each layer."""
        by_layer = [(watched.state.plan.site.layer, name) for name, watched in self.watched.items()]
        for layer, pairs in groupby(
            sorted(by_layer, key=lambda pair: (pair[0] is None, pair[0])), lambda pair: pair[0]
        ):
            names = [name for _, name in pairs if name in self.kept]
            weights = sum(self.watched[name].weight.numel() for name in names)
            if not weights:  # no update was made
                return
            often = sum(int((self.kept[name]["frequency"] > OFTEN).sum()) for name in names)
            row = Oscillated(
                layer=layer,
                weights=weights,
                code_flips=sum(self.flips[name] for name in names) / weights / max(1, self.updates),
                oscillating=often / weights,
            )
            frozen = sum(int(self.kept[name]["frozen"].sum()) for name in names if "frozen" in self.kept[name])
            yield row.extended(frozen=frozen / weights) if self.settings.freeze is not None else row

    def state(self) -> dict[str, Any]:
        """Return, for JSON, what a checkpoint needs besides `save`."""
        return {"updates": self.updates, "flips": self.flips}

    def save(self, folder: Path) -> None:
        """Save levels, turns and frozen weights beside the model of a checkpoint."""
        flat = {f"{name}/{key}": tensor for name, kept in self.kept.items() for key, tensor in kept.items()}
        save_file(flat, folder / FILE)

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Load what `save` and `state` kept."""
        self.updates, self.flips = state["updates"], dict(state["flips"])
        loaded = load_file(folder / FILE)
        for name, watched in self.watched.items():
            device, start = watched.weight.device, f"{name}/"
            own = {key.removeprefix(start): loaded[key].to(device) for key in loaded if key.startswith(start)}
            self.kept |= {name: own} if own else {}  # none before the first update
