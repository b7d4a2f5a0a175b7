"""Dynamic sampling (DAPO, arXiv 2503.14476, 3.2): groups without spread are replaced by fresh ones, up to a limit.

Pure selection: `groups_with_spread` says which groups teach something, `Refill` counts how many more are needed.
"""

from dataclasses import dataclass, replace
from math import ceil

from torch import Tensor

from fp4rl.spec.errors import InvalidValueError

# Two answers differ when their metric does by more than this; rewards that are sums of floats differ by rounding.
TOLERANCE = 1e-6


def groups_with_spread(metric: Tensor, rollout_n: int, tolerance: float = TOLERANCE) -> Tensor:
    """True for groups whose answers differ. metric [groups * rollout_n] -> bool [groups]. NaN answers do not count.

    DAPO filters on accuracy: with a length penalty in it, the *reward* of an all-wrong group spreads, and dividing by
    that small standard deviation blows the penalty up to a full-sized advantage.
    """
    if rollout_n < 2 or metric.dim() != 1 or metric.numel() % rollout_n:
        raise InvalidValueError(f"{tuple(metric.shape)} answers do not make groups of {rollout_n} (at least 2)")
    grouped = metric.float().view(-1, rollout_n)
    highest = grouped.nan_to_num(nan=float("-inf")).amax(-1)
    lowest = grouped.nan_to_num(nan=float("inf")).amin(-1)
    return highest - lowest > tolerance


@dataclass(frozen=True)
class Refill:
    """How far one training batch has been filled. Immutable: `after` returns the next state.

    `wanted`: groups a training batch needs. `max_num_gen_batches`: generations allowed. `kept`, `generated`: groups so
    far. `batches`: generations so far.
    """

    wanted: int
    max_num_gen_batches: int
    kept: int = 0
    generated: int = 0
    batches: int = 0

    def __post_init__(self) -> None:
        if self.wanted < 1 or self.max_num_gen_batches < 1:
            raise InvalidValueError(
                f"a batch of {self.wanted} groups with max_num_gen_batches {self.max_num_gen_batches}: "
                "want at least 1 of each"
            )

    def after(self, kept: int, generated: int) -> "Refill":
        """The state after one more generation of `generated` groups, of which `kept` have spread."""
        if not 0 <= kept <= generated:
            raise InvalidValueError(f"{kept} of {generated} groups kept")
        return replace(self, kept=self.kept + kept, generated=self.generated + generated, batches=self.batches + 1)

    @property
    def full(self) -> bool:
        """Enough groups for the training batch."""
        return self.kept >= self.wanted

    @property
    def gave_up(self) -> bool:
        """Not full, and no generation left."""
        return not self.full and self.max_num_gen_batches <= self.batches

    @property
    def done(self) -> bool:
        """Stop generating: the batch is full, or the limit is reached."""
        return self.full or self.gave_up

    def ask(self, batch: int) -> int:
        """Groups to generate next: what is missing over the share kept so far, at most `batch`; 0 when done.

        The first generation asks for `batch`. A run that keeps 9 of 10 groups refills with 2 prompts, not with a
        whole batch. With nothing kept yet there is no share to go by, so it asks for a whole batch again.
        """
        if self.done:
            return 0
        if self.kept == 0:
            return batch
        return min(batch, ceil((self.wanted - self.kept) * self.generated / self.kept))

    @property
    def trained(self) -> int:
        """Groups that reach the loss: surplus ones are left out, so that every update weighs the same."""
        return min(self.kept, self.wanted)

    def report(self, metric: str) -> str | None:
        """One line when the batch is not full, None when it is; `metric` names what was to spread."""
        if not self.gave_up:
            return None
        action = f"training on {self.kept}" if self.kept else "no update in this step"
        return (
            f"dynamic sampling: {self.kept} of {self.wanted} groups have spread in {metric} after {self.batches} "
            f"generations ({self.generated} groups, max_num_gen_batches {self.max_num_gen_batches}); {action}"
        )

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl. `sampling/dropped_share`: generated groups without spread, over all generated."""
        return {
            "sampling/dropped_share": 1 - self.kept / self.generated if self.generated else 0.0,
            "sampling/gen_batches": float(self.batches),
            "sampling/generated_groups": float(self.generated),
            "sampling/trained_groups": float(self.trained),
        }


def choose(spread: Tensor, missing: int) -> Tensor:
    """Indices of the first `missing` groups with spread, in order of generation. spread bool [groups] -> int64."""
    return spread.nonzero().flatten()[:missing]


def answers_of(groups: Tensor, rollout_n: int) -> Tensor:
    """Row numbers of all answers of `groups` (indices): [groups] -> [groups * rollout_n]."""
    first = groups.unsqueeze(-1) * rollout_n
    return (first + first.new_tensor(range(rollout_n))).flatten()
