"""Where the time of a step goes: every moment belongs to the lap that ends next, so laps add up to the whole."""

import time
from collections import defaultdict
from collections.abc import Callable


class StepTimer:
    """`lap(name)` books the seconds since the lap before it under `name`; `take` hands out the sums and begins anew."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = now()
        self._sums: dict[str, float] = defaultdict(float)

    def restart(self) -> None:
        """What went by since the last lap belongs to nothing."""
        self._last = self._now()

    def lap(self, name: str) -> None:
        """The time since the last lap was for `name`."""
        now = self._now()
        self._sums[name] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        sums = dict(self._sums)
        self._sums.clear()
        return sums
