"""An ordinary checkpoint whose weights hold the rounding: for engines without 4-bit kernels."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from fp4rl.engines.checkpoints.layouts.layout import Layout, Named, Stored, as_text, config_of
from fp4rl.engines.checkpoints.policy import Entry, Policy
from fp4rl.spec.injection import Injection

_NO_INPUTS = {"input": None, "output": None}


class Baked(Layout):
    """Rounded values in the dtype of the files. Inputs are not rounded by whatever loads it."""

    name: ClassVar[str] = "bf16"
    mode: ClassVar[str] = "w4a16"
    deployment: ClassVar[str] = "compressed_tensors"

    def deployed(self, injection: Injection) -> Injection:
        """Return the injection of the weights alone."""
        exceptions = tuple(row.model_copy(update=_NO_INPUTS) for row in injection.by_pattern)
        return injection.model_copy(update={"mode": None, "by_pattern": exceptions, **_NO_INPUTS})

    def served(self, _: Policy) -> str:
        """Return that any engine takes it."""
        return "an ordinary checkpoint, which every engine computes in 16 or 32 bits: its weights hold the rounding"

    def unserved(self, _: Policy) -> Iterator[str]:
        """Yield nothing."""
        return iter(())

    def require(self, policy: Policy) -> None:
        """Take every policy."""

    def tensors(self, policy: Policy, entry: Entry) -> Iterator[Named]:
        """Yield the rounded values, or the tensor as it is."""
        yield entry.name, policy.baked(entry) if entry.weight else policy.value(entry)

    def texts(self, policy: Policy, _: Stored) -> Mapping[str, str]:
        """Return config.json as it was."""
        return {"config.json": as_text(config_of(policy))}
