"""Hardware errors as maths on a tensor: what a faulty multiplier, memory or accumulator does to correct numbers."""

from dataclasses import dataclass, field
from hashlib import blake2b
from threading import get_ident

import torch
from torch import Tensor

from fp4rl.spec.hardware import HardwareError

SAMPLE = 64  # values of a tensor that its seed is derived from


def apply_error(x: Tensor, error: HardwareError, generator: torch.Generator) -> Tensor:
    """Return `x` with the error, same shape and dtype, no gradient; all randomness comes from `generator`."""
    with torch.no_grad():
        size: float | Tensor = error.scale * x.abs().amax() if error.unit == "largest" else error.scale
        match error.kind:
            case "relative" | "jitter":
                return (x + _normal(x, generator) * x.abs() * size).to(x.dtype)
            case "absolute":
                return (x + _normal(x, generator) * size).to(x.dtype)
            case "bias":
                return x + size
            case "dead_zone":
                return x.masked_fill(x.abs() < size, 0.0)
            case "saturation":
                return x.clamp(-size, size)  # type: ignore[arg-type]
            case "spikes":
                hit = _uniform(x.shape, x, generator) < (error.share or 0.0)
                sign = _uniform(x.shape, x, generator).lt(0.5).to(x.dtype) * 2 - 1
                return torch.where(hit, x + sign * size, x)
            case _:  # stuck: the site's generator is seeded the same at every step, so that it hits the same channels
                hit = _uniform(x.shape[-1:], x, generator).argsort() < max(1, round((error.share or 0.0) * x.shape[-1]))
                return torch.where(hit, torch.as_tensor(size, dtype=x.dtype, device=x.device), x)


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=wide)


def _uniform(shape: torch.Size, x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=x.device)


@dataclass
class SiteRng:
    """A site's own generator. What it draws is a function of the seed, the step and the tensor that it is drawn for, so
    that gradient checkpointing recomputes a layer with the same error. Reading the tensor waits for an accelerator.

    `repeatable`: draw even jitter from the seed, so that two models can be compared.
    """

    seed: int
    step: int = 0
    repeatable: bool = False
    _generators: dict[tuple[torch.device, int], torch.Generator] = field(default_factory=dict, repr=False)

    def for_tensor(self, x: Tensor, salt: str) -> torch.Generator:
        """Return the generator, seeded for this tensor in this step."""
        flat = x.detach().reshape(-1)
        read = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].float().cpu().numpy().tobytes()
        return self._seeded(x.device, f"{self.seed}/{self.step}/{salt}".encode() + read)

    def fixed(self, device: torch.device, salt: str) -> torch.Generator:
        """Return the generator, seeded the same at every step: for defects that do not move."""
        return self._seeded(device, f"{self.seed}/{salt}".encode())

    def unknown(self, device: torch.device, salt: str) -> torch.Generator:
        """Return the generator with a seed from the operating system, which cannot be repeated."""
        if self.repeatable:
            return self.fixed(device, salt)
        generator = self._generator(device)
        generator.seed()
        return generator

    def _generator(self, device: torch.device) -> torch.Generator:
        return self._generators.setdefault((device, get_ident()), torch.Generator(device))

    def _seeded(self, device: torch.device, key: bytes) -> torch.Generator:
        seed = int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1
        return self._generator(device).manual_seed(seed)
