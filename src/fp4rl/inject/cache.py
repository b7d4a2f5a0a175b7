"""Rounded copies that are kept, and how stale ones are recognised.

`Tensor._version` alone is not enough for a weight: fused optimizers and writes through `.data` leave it unchanged. So a
copy is used only while each of its weights has the same storage, the same version and the same values in a sample. A
write that the sample misses is announced: by the hook on optimizer steps (`inject.site`), by a change of phase, or by
`Attachment.invalidate`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fp4rl.numerics.device import is_recording
from fp4rl.spec.errors import CheckFailed, InvalidValueError

SAMPLE = 64  # values compared on every use: 0.2 microseconds on a CPU
ACCELERATOR_INTERVAL = 256  # comparing values waits for the device: on an accelerator, one use in this many compares


class WeightFingerprint:
    """Storage, version and a sample of the values of one weight at the moment when a copy was made from it."""

    __slots__ = ("_name", "_pointer", "_read", "_sample", "_uses", "_version", "weight")

    def __init__(self, weight: Tensor, name: str) -> None:
        self.weight, self._name = weight, name
        self._version, self._pointer = weight._version, weight.data_ptr()
        size = weight.numel()
        window = weight.detach().as_strided((min(size, SAMPLE),), (max(1, size // SAMPLE),))
        # On an accelerator the copy is made there, in its turn: reading it now would wait for the device.
        self._read = _reader(window) if weight.is_cpu else window.clone
        self._sample = self._read()
        self._uses = 0

    def fits(self, weight: Tensor) -> bool:
        """Return whether `weight` still has the same storage, version and sample.

        On an accelerator the sample is read on one use in ACCELERATOR_INTERVAL. Raises CheckFailed where it differs
        then, since calls in between used the old copy, and InvalidValueError while a graph of the device is recorded.
        """
        if self._version != weight._version or self._pointer != weight.data_ptr():
            return False
        if weight.is_cpu:
            return self._read() == self._sample
        if is_recording(weight.device):
            kind = weight.device.type.upper()
            raise InvalidValueError(
                f"{self._name}: a {kind} graph would replay today's rounding; run without {kind} graphs"
            )
        self._uses += 1
        if self._uses % ACCELERATOR_INTERVAL == 0 and _bits(self._read()) != _bits(self._sample):
            raise CheckFailed(
                f"{self._name} was written without notice, so up to {ACCELERATOR_INTERVAL} calls used an old rounded "
                "copy; call invalidate() on the attachment after every write"
            )
        return True


def _reader(window: Tensor) -> Callable[[], bytes]:
    """Return a function that reads the present bits of a strided vector on the CPU."""
    return np.asarray(_Memory(window)).tobytes


def _bits(sample: Any) -> bytes:
    return sample.cpu().view(torch.uint8).numpy().tobytes()  # type: ignore[no-any-return]


class _Memory:
    """A CPU tensor's memory as numpy sees it, which reads it in a third of the time that `torch.equal` takes.

    `Tensor.numpy` would make the storage impossible to resize. This does not, so the memory may move: the pointer must
    be compared before the memory is read.
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
    """The rounded copy of one or more weights, and `reach`: a mask of where gradients pass (None: everywhere)."""

    def __init__(self, name: str = "weight") -> None:
        self.name = name
        # Read and written at once: another thread may run the same model.
        self._held: tuple[Tensor, Tensor | None, list[WeightFingerprint]] | None = None

    @property
    def copy(self) -> Tensor | None:
        """The copy that is kept, not asked whether it still holds."""
        return None if self._held is None else self._held[0]

    @property
    def reach(self) -> Tensor | None:
        """Where a gradient may pass to the weights of the copy that is kept."""
        return None if self._held is None else self._held[1]

    def get(self, *weights: Tensor) -> Tensor | None:
        """Return the copy while it is current for these weights, else None. Raises as `WeightFingerprint.fits` does."""
        held = self._held
        if held is None:
            return None
        for fingerprint, weight in zip(held[2], weights, strict=True):
            if not fingerprint.fits(weight):
                self.forget()
                return None
        return held[0]

    def put(self, copy: Tensor, reach: Tensor | None, *weights: Tensor) -> None:
        """Keep a copy made from `weights`, if writes to all of them can be noticed (`tells_writes`)."""
        self.forget()
        if all(map(tells_writes, weights)):
            self._held = copy, reach, [WeightFingerprint(weight, self.name) for weight in weights]

    def forget(self) -> None:
        """Drop the copy; the next use computes it again."""
        self._held = None

    @property
    def frozen(self) -> bool:
        """Whether no optimizer writes the weights that the copy was made from."""
        return self._held is None or not any(fingerprint.weight.requires_grad for fingerprint in self._held[2])


def tells_writes(weight: Tensor) -> bool:
    """Return whether writes to `weight` can be noticed: not to views (FSDP1), strided or inference tensors."""
    return isinstance(weight, nn.Parameter) and weight.is_contiguous() and not weight.is_inference()


class SharedInput:
    """The rounded input of q/k/v or gate/up, which read one tensor: rounded once, dropped after the last reader."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._left = 0
        # Tensor, what it was rounded to, version and gradient mode; read and written at once, as by several threads.
        self._held: tuple[Tensor, Tensor, tuple[int, bool]] | None = None

    def __reduce__(self) -> Any:
        return type(self), (self.readers,)

    def get(self, x: Tensor) -> Tensor | None:
        """Return the rounded `x`, if it is the tensor put last, was not written since and has a reader left."""
        held = self._held
        if held is None or held[0] is not x or held[2] != (x._version, torch.is_grad_enabled()):
            return None
        self._left -= 1
        if self._left <= 0:
            self.forget()
        return held[1]

    def put(self, x: Tensor, rounded: Tensor) -> None:
        """Keep `rounded` until the other readers have read it."""
        if self.readers > 1 and not x.is_inference():
            self._left = self.readers - 1
            self._held = x, rounded, (x._version, torch.is_grad_enabled())

    def forget(self) -> None:
        """Drop both tensors."""
        self._held = None
