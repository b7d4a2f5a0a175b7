"""Rounded tensors that are kept, and how it is known that they still are what their sources would give.

`Tensor._version` alone is not enough for a weight: fused optimizers and writes through `.data` leave it as it was. So a
copy is used only while each of its weights has the storage and the version that it had, and a sample of its values
reads as it did. What a sample can miss is announced: by the hook on optimizer steps (`inject.site`), by a change of
phase and by `Attachment.invalidate`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fp4rl.spec.errors import CheckFailed, InvalidValueError

SAMPLE = 64  # values compared on every use: 0.2 microseconds on a CPU
ACCELERATOR_INTERVAL = 256  # comparing values waits for the device, so there it happens on one use in this many


class WeightFingerprint:
    """How one weight looked when a copy was made from it."""

    __slots__ = ("_name", "_pointer", "_read", "_sample", "_uses", "_version", "weight")

    def __init__(self, weight: Tensor, name: str) -> None:
        self.weight, self._name = weight, name
        self._version, self._pointer = weight._version, weight.data_ptr()
        size = weight.numel()
        window = weight.detach().as_strided((min(size, SAMPLE),), (max(1, size // SAMPLE),))
        self._read = _reader(window)
        self._sample = self._read()
        self._uses = 0

    def fits(self, weight: Tensor) -> bool:
        """Return whether `weight` has the storage, the version and the sample that were seen.

        On an accelerator the sample is read on one use in ACCELERATOR_INTERVAL. Raises CheckFailed where it differs
        there, since calls in between used the old copy, and InvalidValueError while a CUDA graph is recorded.
        """
        if self._version != weight._version or self._pointer != weight.data_ptr():
            return False
        if weight.is_cpu:
            return self._read() == self._sample
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InvalidValueError(
                f"{self._name}: a CUDA graph would replay today's rounding; run without CUDA graphs"
            )
        self._uses += 1
        if self._uses % ACCELERATOR_INTERVAL == 0 and self._read() != self._sample:
            raise CheckFailed(
                f"{self._name} was written without notice, so up to {ACCELERATOR_INTERVAL} calls used an old rounded "
                "copy; call invalidate() on the attachment after every write"
            )
        return True


def _reader(window: Tensor) -> Callable[[], bytes]:
    """Make the function that reads the bits of a strided vector as they are now."""
    if not window.is_cpu:
        return lambda: window.cpu().view(torch.uint8).numpy().tobytes()
    return np.asarray(_Memory(window)).tobytes


class _Memory:
    """A CPU tensor's own memory for numpy, which reads it in a third of the time that `torch.equal` takes.

    `Tensor.numpy` would forbid the storage to be resized, for ever. This leaves it as it is, so the pointer is compared
    before the memory is read.
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
    """The rounded copy of one or more weights, and `reach`: where a gradient may pass to them (None: everywhere)."""

    def __init__(self, name: str = "weight") -> None:
        self.name = name
        self.copy: Tensor | None = None
        self.reach: Tensor | None = None
        self._fingerprints: list[WeightFingerprint] = []

    def get(self, *weights: Tensor) -> Tensor | None:
        """Return the copy while it is what these weights give, else None. Raises as `WeightFingerprint.fits` does."""
        if self.copy is None:
            return None
        for fingerprint, weight in zip(self._fingerprints, weights, strict=True):
            if not fingerprint.fits(weight):
                self.forget()
                return None
        return self.copy

    def put(self, copy: Tensor, reach: Tensor | None, *weights: Tensor) -> None:
        """Keep what was made from `weights`, if all of them tell when they are written."""
        self.forget()
        if all(map(tells_writes, weights)):
            self.copy, self.reach = copy, reach
            self._fingerprints = [WeightFingerprint(weight, self.name) for weight in weights]

    def forget(self) -> None:
        """Let the copy go; the next use makes it afresh."""
        self.copy = self.reach = None
        self._fingerprints = []

    @property
    def frozen(self) -> bool:
        """Whether no optimizer writes the weights that the copy was made from."""
        return not any(fingerprint.weight.requires_grad for fingerprint in self._fingerprints)


def tells_writes(weight: Tensor) -> bool:
    """Return whether a copy of `weight` may be kept: views (FSDP1), strides, inference mode hide how it is written."""
    return isinstance(weight, nn.Parameter) and weight.is_contiguous() and not weight.is_inference()


class SharedInput:
    """q/k/v and gate/up read one tensor, so it is rounded once for all `readers` and let go after the last."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._tensor: Tensor | None = None
        self._rounded: Tensor | None = None
        self._left = 0
        self._key = (-1, False)

    def __reduce__(self) -> Any:
        return type(self), (self.readers,)

    def get(self, x: Tensor) -> Tensor | None:
        """Return what `x` was rounded to, if it was the last one, has not changed since and has a reader left."""
        if self._tensor is not x or self._key != (x._version, torch.is_grad_enabled()):
            return None
        rounded = self._rounded
        self._left -= 1
        if self._left == 0:
            self.forget()
        return rounded

    def put(self, x: Tensor, rounded: Tensor) -> None:
        """Keep it until the other readers have read it."""
        if self.readers > 1 and not x.is_inference():
            self._tensor, self._rounded, self._left = x, rounded, self.readers - 1
            self._key = (x._version, torch.is_grad_enabled())

    def forget(self) -> None:
        """Let go of both tensors."""
        self._tensor = self._rounded = None
