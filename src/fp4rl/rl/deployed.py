"""The weights that are saved and judged: the live ones or their average (EMA), of the last step or of the best one.

The average follows the FP32 masters (clamped, where they are) after every optimizer update, as
`torch.optim.swa_utils.get_ema_multi_avg_fn` does:

    mean_1 = master_1        mean_t = decay * mean_(t-1) + (1 - decay) * master_t
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fp4rl.rl.masters import Masters
from fp4rl.spec.training import Training

_AVERAGE, _BEST = "average.safetensors", "best.safetensors"


@dataclass(frozen=True)
class Best:
    """The best step so far by its score, and the weights [in the model's dtype] of its policy."""

    step: int
    score: float
    weights: Mapping[str, Tensor]


class Deployed:
    """The weights of the policy of one model: average and best step where `recipe` has them, else the live weights.

    `weights_changed` is called whenever the model's weights were exchanged.
    """

    def __init__(
        self, model: nn.Module, masters: Masters | None, recipe: Training, weights_changed: Callable[[], None]
    ) -> None:
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._masters = masters
        self._decay = recipe.ema.decay if recipe.ema is not None else None
        self._weights_changed = weights_changed
        self._mean: dict[str, Tensor] = {}
        self.best: Best | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Let the average follow an optimizer update."""
        if self._decay is None:
            return
        for name, weight in self._weights.items():
            exact = self._masters.exact(name, weight) if self._masters is not None else weight.float()
            if name in self._mean:
                self._mean[name].lerp_(exact, 1 - self._decay)
            else:
                self._mean[name] = exact.detach().clone()

    @property
    def means(self) -> Mapping[str, Tensor]:
        """The averages by the names of their weights, which are written in place; none before the first update."""
        return self._mean

    @contextmanager
    def policy(self) -> Iterator[None]:
        """Put the average into the model, rounded to its dtype, and take it out again: the same bits come back."""
        if not self._mean:
            yield
            return
        before = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._put(self._mean)
        try:
            yield
        finally:
            self._put(before)

    def consider(self, step: int, score: float) -> None:
        """Keep the weights that the policy has now, if they are the best so far; of equals the first stay."""
        if self.best is None or score > self.best.score:
            kept = {name: weight.detach().cpu().clone() for name, weight in self._weights.items()}
            self.best = Best(step, score, kept)

    def deploy(self) -> None:
        """Put what is to be deployed into the model, for good."""
        weights = self.best.weights if self.best is not None else self._mean
        if weights:
            self._put(weights)

    def state(self) -> dict[str, Any]:
        """Return, for JSON, what a checkpoint needs besides `save`."""
        return {} if self.best is None else {"step": self.best.step, "score": self.best.score}

    def save(self, folder: Path) -> None:
        """Save average and best weights beside the model of a checkpoint."""
        if self._mean:
            save_file({name: mean.contiguous() for name, mean in self._mean.items()}, folder / _AVERAGE)
        if self.best is not None:
            save_file({name: weight.contiguous() for name, weight in self.best.weights.items()}, folder / _BEST)

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Load what `save` and `state` kept."""
        if self._decay is not None:
            loaded = load_file(folder / _AVERAGE)
            self._mean = {name: loaded[name].to(weight.device) for name, weight in self._weights.items()}
        if state:
            self.best = Best(int(state["step"]), float(state["score"]), load_file(folder / _BEST))

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(weights[name])
        self._weights_changed()
