"""An ordinary checkpoint whose weights hold the rounding: for engines without 4-bit kernels."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from fp4rl.engines.checkpoints.layouts.layout import Layout, Named, Stored, as_text, config_of
from fp4rl.engines.checkpoints.policy import Entry, Policy


class Baked(Layout):
    """Rounded values in the dtype of the files. Inputs are not rounded by whatever loads it."""

    name: ClassVar[str] = "bf16"

    def require(self, policy: Policy) -> None:
        """Take every policy."""

    def tensors(self, policy: Policy, entry: Entry) -> Iterator[Named]:
        """Yield the rounded values, or the tensor as it is."""
        yield entry.name, policy.baked(entry) if entry.weight else policy.value(entry)

    def texts(self, policy: Policy, stored: Stored) -> Mapping[str, str]:
        """Return config.json as it was."""
        return {"config.json": as_text(config_of(policy))}
