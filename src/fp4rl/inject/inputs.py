"""One rounded input for the layers that read the same tensor."""

from typing import Any

import torch
from torch import Tensor


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
        """What `x` was rounded to, if it was the last one, has not changed since and has a reader left."""
        if self._tensor is not x or self._key != (x._version, torch.is_grad_enabled()):
            return None
        rounded = self._rounded
        self._left -= 1
        if self._left == 0:
            self.forget()
        return rounded

    def put(self, x: Tensor, rounded: Tensor) -> None:
        """Remember it until the other readers have read it."""
        if self.readers > 1 and not x.is_inference():
            self._tensor, self._rounded, self._left = x, rounded, self.readers - 1
            self._key = (x._version, torch.is_grad_enabled())

    def forget(self) -> None:
        """Let go of both tensors."""
        self._tensor = self._rounded = None
