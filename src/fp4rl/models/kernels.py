"""Which kernels transformers computes with."""

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from transformers.integrations import moe


def without_grouped_kernel() -> AbstractContextManager[Any]:
    """Let `grouped_mm` be transformers' own loop inside the `with`, as where torch has no kernel, so in float64 too."""
    return patch.object(moe, "_can_use_grouped_mm", lambda *_: False)
