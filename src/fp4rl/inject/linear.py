"""A live `nn.Linear` that computes with rounded numbers: its class is swapped, all that it holds stays."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from fp4rl.inject.cache import QuantCache, SharedInput
from fp4rl.inject.fused import FusedGroup, with_largest
from fp4rl.inject.matmul import linear_with_errors
from fp4rl.inject.plan import SitePlan
from fp4rl.inject.rounding import through
from fp4rl.inject.site import SiteState
from fp4rl.numerics.levels import levels
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import GRADIENTS


class LinearState(SiteState):
    """The state of an injected linear layer: its rounded weight, and what acts in the present phase."""

    def __init__(self, plan: SitePlan, injection: Injection, shared: SharedInput) -> None:
        super().__init__(plan, injection, shared)
        self.cache = QuantCache(plan.name)
        self.weight_on = self.input_on = self.output_on = self.products_on = False
        self.only_weight = False
        self.transposed = plan.site.transposed  # the parameter is [in, out]; None: not known yet
        self.scaling: tuple[float, ...] = ()  # of the adapters in the kept copy, where it is of a sum
        self.group: FusedGroup | None = None  # the layers that share a factor
        self.scaling_beside: tuple[float, ...] = ()  # of the adapters of the others
        self.anchor: Tensor | None = None  # like the stored weight: what decides between its two levels while it learns

    def __reduce__(self) -> Any:
        kind, arguments, active = super().__reduce__()
        return kind, arguments, (active, self.group)

    def __setstate__(self, state: Any) -> None:
        active, self.group = state
        super().__setstate__(active)

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Compute y [..., out] = Q(x) Q(W)^T + b, each Q where its point is active; gradients pass straight through."""
        self.count()
        weight = self.as_used(self.rounded_weight(layer) if self.weight_on else layer.weight)
        x = self.rounded_input(x) if self.input_on else x
        y = linear_with_errors(x, weight, layer.bias, self) if self.products_on else linear(x, weight, layer.bias)
        return self.rounded_values(y, "output") if self.output_on else y

    def rounded_weight(self, layer: nn.Linear) -> Tensor:
        """Return the rounded weight as stored, with a straight-through gradient to the master weight."""
        return self.copy_of(layer.weight, *self.made_from(layer))

    def made_from(self, layer: Any) -> tuple[Tensor, ...]:
        """Return the parameters that the layer's rounded copy depends on: its own, then those of its group."""
        return (*self.sources(layer), *self.beside())

    def beside(self) -> tuple[Tensor, ...]:
        """Return the parameters of the other layers of its group; drops the copy where an adapter was rescaled."""
        others = list(self.group.others(self)) if self.group is not None else []
        scaling = tuple(each for state, module in others for each in state.scalings(module))
        if scaling != self.scaling_beside:
            self.cache.forget()
            self.scaling_beside = scaling
        return tuple(weight for state, module in others for weight in state.sources(module))

    def sources(self, layer: Any) -> tuple[Tensor, ...]:
        """Return the parameters that the layer's own weight is made of."""
        return (layer.weight,)

    def scalings(self, _layer: Any) -> tuple[float, ...]:
        """Return the scalings of the adapters in the layer's own weight."""
        return ()

    def rounded_input(self, x: Tensor) -> Tensor:
        """Return the rounded input, shared with the layers that read the same tensor."""
        rounded = None if torch.compiler.is_compiling() else self.shared.get(x)
        if rounded is not None:
            self.note("input", x, rounded, x.numel())
            return rounded
        rounded = self.rounded_values(x, "input") if "input" in self.points else x
        if self.has_errors("input"):
            rounded = through(rounded, self.with_errors(rounded.detach(), "input", x), None)
        elif not torch.compiler.is_compiling():
            self.shared.put(x, rounded)
        return rounded

    def copy_of(self, weight: Tensor, *made_from: Tensor) -> Tensor:
        """Return the rounded copy of `weight`; it is kept until one of the parameters `made_from` changes."""
        copy = reach = None
        if not torch.compiler.is_compiling():
            copy, reach = self.cache.get(*made_from), self.cache.reach
        elements = weight.numel() if copy is None else 0
        if copy is None:
            copy, reach = self._make(weight)
            if self.keep_copies and not torch.compiler.is_compiling():
                self.cache.put(copy, reach, *made_from)
        if "weight" in self.points:
            self.note("weight", weight, copy, elements)
        rotation = self.plan.weight.rotation if self.plan.weight is not None else None
        if reach is not None and rotation is not None and self.transposed:
            return through(weight.mT, copy.mT, reach.mT, rotation).mT
        return through(weight, copy, reach, rotation)

    def master(self, layer: nn.Linear) -> Tensor:
        """Return the present master weight as [out, in]."""
        return self.as_used(layer.weight)

    def as_used(self, weight: Tensor) -> Tensor:
        """Return the parameter, or its copy, as [..., out, in]."""
        return weight.mT if self.transposed else weight

    def _make(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the rounded copy and the mask of where gradients pass, both laid out as the weight is stored."""
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return self._as_stored(weight)
        # Outside inference mode: a tensor made inside it cannot be saved for a backward later.
        with torch.inference_mode(False), torch.no_grad():
            return self._as_stored(weight)

    def _as_stored(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.transposed:
            return self._made(weight)
        copy, reach = self._made(weight.mT.contiguous())
        return copy.mT.contiguous(), None if reach is None else reach.mT.contiguous()

    def _made(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        copy, reach = weight.detach(), None
        if "weight" in self.points:
            generator = self._weight_rng(weight) if self.present["weight"].draws else None
            copy, reach = self._under_one_factor(weight, generator)
            if self.anchored:
                level, scale = self.levels(weight)
                copy = (level * scale).to(weight.dtype)
        if self.has_errors("weight"):
            copy = self.with_errors(copy, "weight", copy)
        return copy, reach

    def _under_one_factor(self, weight: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        if self.group is None:
            return self.rounded(weight, "weight", generator)
        copy, reach = self.rounded(with_largest(weight, self.group.largest()), "weight", generator)
        return copy[:-1], None if reach is None else reach[:-1]

    @property
    def anchored(self) -> bool:
        """Whether an anchor decides in this phase; evaluations and what is saved have the usual rounding."""
        return self.anchor is not None and self.phase in ("rollout", "training")

    def levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the present levels of a weight given as [..., out, in], and the scales that they are multiplied by."""
        fmt, rows = self.plan.weight, weight.shape[-2]
        assert fmt is not None
        anchor = self.as_used(self.anchor).to(self.dtype) if self.anchor is not None and self.anchored else None
        seen = weight.detach().to(self.dtype)
        if self.group is not None:
            seen = with_largest(seen, self.group.largest())
            anchor = None if anchor is None else pad(anchor, (0, 0, 0, 1))
        made = []
        for number, matrix in enumerate(seen.reshape(-1, *seen.shape[-2:])):
            own = None if anchor is None else anchor.reshape(-1, *seen.shape[-2:])[number].contiguous()
            made.append(levels(matrix.contiguous(), fmt, own))
        level, scale = (torch.stack([pair[i][:rows] for pair in made]).view(weight.shape) for i in (0, 1))
        return level, scale

    def _weight_rng(self, weight: Tensor) -> torch.Generator:
        # Training draws new numbers at every step; in other phases the same weights round the same way twice.
        salt = f"weight/{self.rng.step}" if self.phase == "training" else "weight"
        return self.rng.fixed(weight.device, salt)

    def would_change(self, point: str, x: Tensor) -> bool:
        """Return whether rounding `x` changes any value; a weight is rounded along `in`, however it is stored."""
        if point != "weight":
            return super().would_change(point, x)
        weight = self.as_used(x).contiguous()
        return super().would_change(point, weight if self.group is None else with_largest(weight, self.group.largest()))

    def enter(self, phase: Any, points: frozenset[str], step: int | None = None) -> None:
        """Begin a phase: compute once here everything that a forward has to check."""
        super().enter(phase, points, step)
        self.weight_on = "weight" in self.points or self.has_errors("weight")
        self.input_on = "input" in self.points or self.has_errors("input")
        self.output_on = "output" in self.points
        self.products_on = self.has_errors("matmul") or bool(self.points & set(GRADIENTS))
        self.only_weight = self.weight_on and not (self.input_on or self.output_on or self.products_on)

    def recount(self) -> None:
        """Set the counters to zero; the copy is dropped, so that the next one is compared with its master (a look)."""
        super().recount()
        self.cache.forget()

    def stepped(self) -> None:
        """Drop the copy after an optimizer step, which leaves frozen weights unchanged."""
        super().stepped()
        if not self.cache.frozen:
            self.cache.forget()

    def forget(self) -> None:
        """Drop what was made from the weight and from the last input."""
        super().forget()
        self.cache.forget()


class InjectedLinear(nn.Linear):
    """`nn.Linear` under injection: same object, parameters, hooks and state-dict keys; see `fp4rl.inject.attach`."""

    injected: LinearState

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., in_features] -> [..., out_features]; see `LinearState.forward`."""
        site = self.injected
        if site.only_weight and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Every generated token comes through here: with a current copy of the weight, nothing else is to be done.
            copy = site.cache.get(self._parameters["weight"], *(site.beside() if site.group else ()))  # type: ignore[arg-type]
            if copy is not None:
                site.calls += 1
                return linear(x, copy, self._parameters["bias"])
        return site.forward(self, x)
