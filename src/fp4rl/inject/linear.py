"""A live `nn.Linear` that computes with rounded numbers: its class is swapped, everything it holds stays."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fp4rl.inject.inputs import SharedInput
from fp4rl.inject.matmul import harmed_linear
from fp4rl.inject.plan import SitePlan
from fp4rl.inject.rounded import QuantCache, through, watchable
from fp4rl.inject.state import Injected, Settings, SiteState
from fp4rl.spec.points import GRADIENTS


class LinearState(SiteState):
    """What an injected linear layer knows beyond the frame: its rounded weight, and which way its forward takes."""

    def __init__(self, plan: SitePlan, settings: Settings, shared: SharedInput, frozen: bool = False) -> None:
        super().__init__(plan, settings)
        self.shared = shared
        self.kept = QuantCache(plan.name, frozen)
        self.weight_on = self.input_on = self.output_on = self.products_on = False
        self.only_weight = False
        self.weight_points: tuple[str, ...] = ()
        self.transposed = plan.site.transposed  # the parameter is [in, out]; None: not known yet

    def _ingredients(self) -> tuple[Any, ...]:
        return self.plan, self.settings, self.shared, self.kept.frozen

    def enter(self, phase: Any, points: frozenset[str]) -> None:
        """Begin a phase: everything that a forward has to ask is answered here once."""
        before = self.points, self.errors
        super().enter(phase, points)
        self.weight_on = "weight" in self.points or self.has_errors("weight")
        self.weight_points = tuple(point for point in self.active if point == "weight" or "@weight" in point)
        self.input_on = "input" in self.points or self.has_errors("input")
        self.output_on = "output" in self.points
        self.products_on = self.has_errors("matmul") or bool(self.points & set(GRADIENTS))
        self.only_weight = self.weight_on and not (self.input_on or self.output_on or self.products_on)
        self.shared.forget()
        if before == (self.points, self.errors):
            self.kept.revalidate()
        else:
            self.kept.forget()

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The layer's result with every active point harmed; gradients pass straight through."""
        if torch.compiler.is_compiling():
            self.ticks.add_(1)
        else:
            self.calls += 1
        weight = self._as_used(self.weight(layer) if self.weight_on else layer.weight)
        if self.input_on:
            x = self._input(x)
        y = self._product(x, weight, layer.bias)
        return self.rounded_values(y, "output") if self.output_on else y

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return harmed_linear(x, weight, bias, self) if self.products_on else linear(x, weight, bias)

    @property
    def in_forward(self) -> bool:
        """Whether the product of the forward comes out wrong."""
        return any(error.forward and error.point == "matmul" for error in self.errors)

    def result(self, product: str, y: Tensor, drawn_for: Tensor) -> Tensor:
        """The result of one product of the matmul with its errors."""
        return self.with_errors(y, "matmul", drawn_for, backward="" if product == "forward" else product)

    def master(self, layer: nn.Linear) -> Tensor:
        """What is rounded here [out, in], as it is now."""
        return self._as_used(layer.weight)

    def _as_used(self, weight: Tensor) -> Tensor:
        """The parameter, or its copy, as [..., out, in]."""
        return weight.mT if self.transposed else weight

    def weight(self, layer: nn.Linear) -> Tensor:
        """The harmed weight as it is stored, with a gradient to the master where one is computed."""
        return self.copy_of(layer.weight, (layer.weight,))

    def copy_of(self, weight: Tensor, made_from: tuple[Tensor, ...]) -> Tensor:
        """The harmed copy of `weight`, kept while what it was `made_from` stays as it is."""
        if torch.compiler.is_compiling():
            with torch.no_grad():
                copy, reach = self._make(weight)
            for point in self.weight_points:
                self.note(point, weight, copy, weight.numel())
            return through(weight, copy, reach)
        made = self.kept.made
        told = self.kept.frozen or self.audience is not None
        keep = told and self.keep_copies and all(watchable(tensor) for tensor in made_from)
        copy = self.kept.of(made_from, lambda: self._make(weight), keep)
        for point in self.weight_points:
            self.note(point, weight, copy, (self.kept.made - made) * weight.numel())
        return through(weight, copy, self.kept.reach)

    def _make(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the harmed copy, where a gradient may pass), both as the weight is stored."""
        if not self.transposed:
            return self._made(weight)
        copy, reach = self._made(weight.mT.contiguous())
        return copy.mT.contiguous(), None if reach is None else reach.mT.contiguous()

    def _made(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        copy, reach = weight.detach(), None
        fmt = self.plan.weight if "weight" in self.points else None
        if fmt is not None:
            generator = self._rounding_chance(weight) if fmt.rounding == "stochastic" else None
            copy, reach = self.rounded(weight, "weight", generator)
        if self.has_errors("weight"):
            copy = self.with_errors(copy, "weight", copy)
        return copy, reach

    def _rounding_chance(self, weight: Tensor) -> torch.Generator:
        # Training draws anew at every step; elsewhere the same weights round the same way twice.
        salt = f"weight/{self.chance.step}" if self.phase == "training" else "weight"
        return self.chance.fixed(weight.device, salt)

    def _input(self, x: Tensor) -> Tensor:
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

    def would_change(self, point: str, x: Tensor) -> bool:
        """As above; a weight is rounded along `in` whichever way it is stored."""
        return super().would_change(point, self._as_used(x).contiguous() if point == "weight" else x)

    def recount(self) -> None:
        """Start counting afresh; a kept copy is held against its master again, which is a look."""
        super().recount()
        self.kept.revalidate()

    def forget(self, *, frozen: bool = True) -> None:
        """Throw away what was made from the weight and the last input; frozen weights are doubted only if asked."""
        super().forget()
        self.shared.forget()
        if frozen or not self.kept.frozen:
            self.kept.revalidate()

    def release(self) -> None:
        """Act no more, and let go of every copy."""
        super().release()
        self.shared.forget()
        self.kept.forget()


class InjectedLinear(Injected, nn.Linear):
    """`nn.Linear` under injection: same object, parameters, hooks and state-dict keys; see `fp4rl.inject.attach`."""

    injected: LinearState

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        state = self.injected
        if state.only_weight and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The way of every generated token: a current copy of the weight, nothing else to do.
            copy = state.kept.current(self._parameters["weight"])  # type: ignore[arg-type]
            if copy is not None:
                state.calls += 1
                return linear(x, copy, self._parameters["bias"])
        return state.forward(self, x)
