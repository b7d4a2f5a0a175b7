"""A copy made from weights, and how it is known that it still is what they would give.

`Tensor._version` alone is not enough: fused optimizers and writes through `.data` leave it as it was. So a copy counts
as current only while every weight is the same object with the same storage and version *and* a sample of its values
reads as it did when the copy was made. Explicit invalidation comes on top (optimizer steps, loads, phase changes).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fp4rl.spec.errors import CheckFailed, InvalidValueError

SAMPLE = 64  # values compared on every use: 0.2 microseconds on a CPU
ACCELERATOR_INTERVAL = 256  # comparing values waits for the device, so there it happens on one use in this many

Make = Callable[[], tuple[Tensor, Tensor | None]]
"""-> the rounded copy, and where the gradient may pass (None: everywhere)."""


class Watch:
    """What one weight looked like at a certain moment."""

    __slots__ = ("_pointer", "_read", "_seen", "_tensor", "_version")

    def __init__(self, weight: Tensor) -> None:
        self._tensor = weight
        self._version, self._pointer = weight._version, weight.data_ptr()
        size = weight.numel()
        window = weight.detach().as_strided((min(size, SAMPLE),), (max(1, size // SAMPLE),))
        self._read = _reader(window)
        self._seen = self._read()

    def same_tensor(self, weight: Tensor) -> bool:
        """Whether it is the same object, in the same place, with no write that PyTorch counted."""
        return self._tensor is weight and self._version == weight._version and self._pointer == weight.data_ptr()

    def same_values(self) -> bool:
        """Whether the sample still reads the same; to be asked of the same tensor alone."""
        return self._read() == self._seen

    def saw_the_same(self, other: "Watch") -> bool:
        """Whether another look, perhaps at another tensor, read the same sample."""
        return self._seen == other._seen


def _reader(window: Tensor) -> Callable[[], bytes]:
    """What gives the bits of a strided vector as they are now."""
    if not window.is_cpu:
        return lambda: window.cpu().view(torch.uint8).numpy().tobytes()
    return np.asarray(_Memory(window)).tobytes


class _Memory:
    """A CPU tensor's own memory for numpy, which reads it in a third of the time that `torch.equal` takes.

    `Tensor.numpy` would forbid the storage to be resized, for ever. This leaves it as it is, so whoever reads asks
    first whether it still is there.
    """

    def __init__(self, window: Tensor) -> None:
        size = window.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (window.data_ptr(), True),
            "shape": tuple(window.shape),
            "strides": tuple(size * stride for stride in window.stride()),
            "typestr": f"|V{size}",
        }


class QuantCache:
    """A copy made from one or more weights on demand and kept until it may be stale.

    With `frozen` weights a copy outlives invalidation: it is only doubted, and kept when a checksum over every bit of
    the weights is what it was. `made` counts how often it was made, `stale` how often the sample contradicted a copy
    that nobody had invalidated. On an accelerator that raises CheckFailed, because calls in between used the old copy.
    """

    def __init__(self, name: str = "weight", frozen: bool = False) -> None:
        self.name = name
        self.frozen = frozen
        self.copy: Tensor | None = None
        self.reach: Tensor | None = None
        self.made = 0
        self.stale = 0
        self._watches: list[Watch] = []
        self._checksum = 0
        self._doubted = False
        self._uses = 0

    def current(self, weight: Tensor) -> Tensor | None:
        """The copy if it still belongs to this one weight, else None."""
        if self.copy is None or self._doubted or not self._watches[0].same_tensor(weight):
            return None
        if self._contradicted(weight):
            self.forget()
        return self.copy

    def of(self, weights: Sequence[Tensor], make: Make, keep: bool) -> Tensor:
        """The kept copy while it is current, else a new one, which is kept only if `keep`."""
        if not self.holds(weights):
            # Outside inference mode: a tensor made inside it could never be saved for a backward.
            with torch.inference_mode(False), torch.no_grad():
                self.copy, self.reach = make()
                self._watches = [Watch(weight) for weight in weights] if keep else []
                self._checksum = checksum(weights) if keep and self.frozen else 0
            self.made += 1
            self._uses = 0
            self._doubted = False
        copy = self.copy
        assert copy is not None
        if not keep:
            self.copy = None
        return copy

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether there is a copy, and these weights are what it was made from."""
        if self.copy is None or len(self._watches) != len(weights):
            return False
        if self._doubted:
            self._doubted = False
            return self._still_right(self.copy, weights)
        if not all(watch.same_tensor(weight) for watch, weight in zip(self._watches, weights, strict=True)):
            return False
        return not self._contradicted(weights[0])

    def _still_right(self, copy: Tensor, weights: Sequence[Tensor]) -> bool:
        """Whether a doubted copy is where its weights are, and they hold what they held: all bits, and the sample in
        its order."""
        if copy.device != weights[0].device or checksum(weights) != self._checksum:
            return False
        before, self._watches = self._watches, [Watch(weight) for weight in weights]
        return all(old.saw_the_same(new) for old, new in zip(before, self._watches, strict=True))

    def _contradicted(self, weight: Tensor) -> bool:
        """Whether the sample was read, and reads otherwise than it did."""
        if not (weight.is_cpu or self._due(weight)):
            return False
        for watch in self._watches:  # no all(): this runs for every layer of every generated token
            if not watch.same_values():
                break
        else:
            return False
        self.stale += 1
        if not weight.is_cpu:
            raise CheckFailed(
                f"{self.name} was written without notice, so up to {ACCELERATOR_INTERVAL} calls used an old rounded "
                "copy; call invalidate() on the attachment after every write"
            )
        return True

    def _due(self, weight: Tensor) -> bool:
        """Whether an accelerator is to be asked at this use."""
        refuse_capture(weight, self.name)
        self._uses += 1
        return self._uses % ACCELERATOR_INTERVAL == 0

    def revalidate(self) -> None:
        """Weights may have been written: frozen ones are compared by a checksum on the next use, others made afresh."""
        if self.frozen:
            self._doubted = True
        else:
            self.forget()

    def forget(self) -> None:
        """Throw the copy away; the next use makes it afresh."""
        self.copy = self.reach = None
        self._watches = []


def refuse_capture(weight: Tensor, name: str) -> None:
    """Raise InvalidValueError while a CUDA graph is recorded: replaying it, the rounded weight would stay as it is for
    ever."""
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InvalidValueError(
            f"{name}: a CUDA graph would replay the rounding of today's weight; run without CUDA graphs"
        )


def watchable(weight: Tensor) -> bool:
    """Whether a copy of it may be kept: a view, a stride or inference mode would hide from us how it is written.

    FSDP1 puts plain views in the place of parameters, whose storage comes and goes.
    """
    return isinstance(weight, nn.Parameter) and weight.is_contiguous() and not weight.is_inference()


def checksum(weights: Sequence[Tensor]) -> int:
    """The sum of all bits of contiguous weights, eight bytes at a time: 2 ms for 28 MB, where rounding takes 15."""
    return sum(_sum_of_bits(weight.detach().view(-1)) for weight in weights)


def _sum_of_bits(flat: Tensor) -> int:
    own = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    at_once = 8 // flat.element_size()
    if flat.storage_offset() % at_once:  # a view into a larger storage, beginning in the middle of eight bytes
        return int(flat.view(own).sum(dtype=torch.int64))
    whole = flat.numel() // at_once * at_once
    return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].view(own).sum(dtype=torch.int64))


class StraightThrough(torch.autograd.Function):
    """The rounded copy in the forward; in the backward the gradient goes to the master as it comes, or, where `reach`
    is given, only to values that were not clipped."""

    @staticmethod
    def forward(ctx: Any, _master: Tensor, copy: Tensor, reach: Tensor | None) -> Tensor:
        """`master`, its rounded `copy` of the same shape and dtype, and `reach` (bool, or None)."""
        ctx.reach = reach
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradient of the master, alone."""
        return (gradients[0] if ctx.reach is None else gradients[0] * ctx.reach), None, None


def through(master: Tensor, copy: Tensor, reach: Tensor | None) -> Tensor:
    """`copy` with the master's gradient. Inside `torch.compile` as a sum: it adds an exact zero to the copy."""
    if not (master.requires_grad and torch.is_grad_enabled()):
        return copy
    if torch.compiler.is_compiling():
        zero = master - master.detach()
        return copy + (zero if reach is None else zero * reach)
    return StraightThrough.apply(master, copy, reach)  # type: ignore[no-any-return, no-untyped-call]
