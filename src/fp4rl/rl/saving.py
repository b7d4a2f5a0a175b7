"""When a run keeps a checkpoint besides those of `save_freq`: by the clock, so that what interrupts it costs little."""

import time
from collections.abc import Callable

EVERY_S = 300.0
_SHARE = 20  # writing checkpoints may take a twentieth of the time, however large they are


class SaveClock:
    """Says when the next checkpoint is due, by the time since the last one and what that one took to write."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._last = self._begun = now()
        self._took = 0.0

    def due(self, *, last: bool) -> bool:
        """Whether it is time. At the `last` step sooner: the evaluation that follows has no step to save at."""
        wait = max(EVERY_S, _SHARE * self._took)
        return self._now() - self._last >= (wait / 10 if last else wait)

    def begin(self) -> None:
        """A checkpoint is about to be written."""
        self._begun = self._now()

    def end(self) -> None:
        """It is written."""
        self._last = self._now()
        self._took = self._last - self._begun
