"""Which problems come next: a seeded shuffle of the training split, epoch after epoch, with a position to save."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.task import Problem


@dataclass
class PromptStream:
    """Endless. `position` counts problems handed out; with `seed` it is the whole state of the stream.

    Dynamic sampling takes a varying number of problems a step, so the trainer's own data loader cannot serve it. Each
    of several processes has a stream of its own: process `rank` of `world` gets every `world`-th problem of the order.
    Raises InvalidValueError for an empty training split.
    """

    problems: Sequence[Problem]
    seed: int
    position: int = 0
    rank: int = 0
    world: int = 1
    _order: list[int] = field(default_factory=list, repr=False)
    _epoch: int = field(default=-1, repr=False)

    def __post_init__(self) -> None:
        if not self.problems:
            raise InvalidValueError("the training split is empty: there is nothing to train on")

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Problem:
        epoch, index = divmod(self.position * self.world + self.rank, len(self.problems))
        if epoch != self._epoch:
            self._order = list(range(len(self.problems)))
            Random(f"prompts/{self.seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        self.position += 1
        return self.problems[self._order[index]]
