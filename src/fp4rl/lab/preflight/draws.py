"""Hardware errors and random rounding with the very random numbers that were drawn while a live object made them."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fp4rl.inject import site
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.formats import Format
from fp4rl.spec.hardware import HardwareError

_QUANTIZER = "fake_quantize"  # as `site` calls it


class Draws:
    """Keeps what `torch.randn` and `torch.rand` give while it is `kept`, and the states of the generators that random
    rounding draws from, to be taken again in that order.

    They are told apart by the size of the last axis and that of all others together, and by the format.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int, int], list[Tensor]] = defaultdict(list)
        self._left: dict[tuple[str, int, int], list[Tensor]] = {}
        self._lacking = 0

    @contextmanager
    def kept(self) -> Iterator["Draws"]:
        """Keep what is drawn inside the `with`, in backwards too, which a mode of torch functions would not reach."""
        randn, rand = (partial(self._keep, name, getattr(torch, name)) for name in ("randn", "rand"))
        rounding = partial(self._rounding, getattr(site, _QUANTIZER))
        with patch.multiple(torch, randn=randn, rand=rand), patch.object(site, _QUANTIZER, rounding):
            yield self

    def _keep(self, name: str, draw: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        made = draw(*args, **kwargs)
        self._kept[_key(name, made.shape)].append(made.clone())
        return made

    def _rounding(
        self, quantize: Callable[..., Tensor], x: Tensor, fmt: Format, *, generator: torch.Generator | None = None
    ) -> Tensor:
        if _draws(fmt) and generator is not None:
            self._kept[_key(str(fmt), x.shape)].append(generator.get_state())
        return quantize(x, fmt, generator=generator)

    def rewound(self) -> "Draws":
        """Return itself with all that was drawn still to be taken."""
        self._left, self._lacking = {key: [*drawn] for key, drawn in self._kept.items()}, 0
        return self

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """Return the next numbers of that shape in float64; NaN where none are left, which `wrong` then tells."""
        drawn = self._next(name, shape)
        if drawn is None:
            return torch.full(shape, torch.nan, dtype=torch.float64)
        return drawn.double().reshape(shape)

    def rounded(self, x: Tensor, fmt: Format) -> Tensor:
        """Round x as the quantizer does, at random with the next numbers of that format and shape; NaN without any."""
        if not _draws(fmt):
            return fake_quantize(x, fmt)
        state, generator = self._next(str(fmt), x.shape), torch.Generator()
        if state is None:
            return torch.full_like(x, torch.nan)
        generator.set_state(state)
        return fake_quantize(x, fmt, generator=generator)

    def _next(self, name: str, shape: torch.Size) -> Tensor | None:
        left = self._left.get(_key(name, shape))
        if not left:
            self._lacking += 1
            return None
        return left.pop(0)

    @property
    def wrong(self) -> str:
        """What the formulas do not explain: too few draws or too many, noise drawn twice; empty where all is well."""
        unused = sum(map(len, self._left.values()))
        if self._lacking or unused:
            return f"{self._lacking} draws fewer than in the formulas, {unused} more"
        noise = (drawn for (name, *_), drawn in self._kept.items() if name == "randn")
        alike = sum(torch.equal(a, b) for drawn in noise for a, b in combinations(drawn, 2) if a.shape == b.shape)
        return f"{alike} draws repeat another one" if alike else ""


def _draws(fmt: Format) -> bool:
    return fmt.rounding == "stochastic"


def _key(name: str, shape: torch.Size) -> tuple[str, int, int]:
    return name, shape[:-1].numel(), shape[-1]


def erring(y: Tensor, error: HardwareError, draws: Draws) -> Tensor:
    """Return a tensor [..., n] in float64 as an error leaves it (`spec.hardware.HardwareError` has the formulas)."""
    size = error.scale * (float(y.abs().max()) if error.unit == "largest" else 1.0)
    match error.kind:
        case "relative" | "jitter":
            return y + size * y.abs() * draws.take("randn", y.shape)
        case "absolute":
            return y + size * draws.take("randn", y.shape)
        case "bias":
            return y + size
        case "dead_zone":
            return y * (y.abs() >= size)
        case "saturation":
            return y.sign() * y.abs().clamp(max=size)
        case "spikes":
            hit = draws.take("rand", y.shape) < float(error.share or 0)
            up = draws.take("rand", y.shape) < 0.5  # as often up as down
            return torch.where(hit, torch.where(up, y + size, y - size), y)
        case "stuck":
            number = max(1, round(float(error.share or 0) * y.shape[-1]))
            dead = draws.take("rand", y.shape[-1:]).argsort() < number
            return torch.where(dead, size, y)
