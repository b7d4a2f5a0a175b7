"""The clamp between a master and the model's weight: each block at a learned share of its largest magnitude.

    W' = clamp(W, -b, b),   b = sigmoid(strength) * max |W of the block|

LWC of OmniQuant (arXiv 2308.13137, section 3.2), a descendant of PACT (arXiv 1805.06085). The blocks are those that
share a scale of the weight's format. The model holds W' itself, so that quantizer, sampler, export and checks know
nothing of the clamp; W and the strengths are kept by the optimizer's side alone.
"""

import torch
from torch import Tensor, nn

from fp4rl.inject.linear import LinearState
from fp4rl.numerics.blocks import Grouping
from fp4rl.spec.errors import InvalidValueError


class Clamp:
    """The clamp of one weight, as it is stored; `strength` is trained, one number a block."""

    def __init__(self, state: LinearState, weight: Tensor, init: float) -> None:
        fmt = state.plan.weight
        assert fmt is not None
        if state.plan.site.transposed is None:  # whatever a forward has shown since: a resumed run makes none before
            raise InvalidValueError(
                f"training.learned_clipping: nothing tells along which axis {state.plan.name} is rounded; leave it "
                f"out: injection.targets.leave: [{state.plan.name}]"
            )
        self.layer, self.init, self._stored = state.plan.site.layer, init, state.as_used
        self._blocks = Grouping.of(state.as_used(weight).shape, fmt)
        first = torch.full(self._blocks.shape_of_scales, init, dtype=torch.float32, device=weight.device)
        self.strength = nn.Parameter(first)

    def __call__(self, master: Tensor) -> Tensor:
        """Return W' of a master, in float32, laid out as it is stored."""
        blocks = self._blocks.split(self._stored(master).contiguous())
        largest = blocks.abs().amax(self._blocks.axes, keepdim=True)
        bound = self._blocks.scales_inside(self.strength).sigmoid() * largest
        clamped: Tensor = self._stored(self._blocks.join(blocks.clamp(-bound, bound))).contiguous()
        return clamped

    def gradients(self, master: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of a master and of the strengths, given that of W'."""
        with torch.enable_grad():
            whole, strengths = torch.autograd.grad(self(master), (master, self.strength), gradient)
        return whole, strengths
