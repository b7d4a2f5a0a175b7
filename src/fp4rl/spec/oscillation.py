"""What is done about weights that hop between two codes of their format."""

from collections.abc import Iterator

from pydantic import Field

from fp4rl.spec.formats import Format
from fp4rl.spec.frozen import Spec
from fp4rl.spec.injection import Injection


class Oscillation(Spec):
    """Codes of trained weights are compared after every update, and hopping ones held back (arXiv 2203.11086); with
    neither `dampen` nor `freeze` it is measured alone."""

    dampen: float = Field(
        default=0.0, ge=0.0, description="coefficient of the squared distance of weights to their levels, in the loss"
    )
    freeze: float | None = Field(
        default=None, gt=0.0, lt=1.0, description="how often a weight may turn back before it stays at its mean level"
    )
    decay: float = Field(
        default=0.99, ge=0.0, lt=1.0, description="what is kept of the running means of turns and levels at each update"
    )

    def refused(self, injection: Injection | None) -> Iterator[str]:
        """Yield why it cannot act under an injection."""
        yield from without_codes(injection, "dampen and freeze" if self.dampen or self.freeze is not None else "")


def without_codes(injection: Injection | None, unrotated: str) -> Iterator[str]:
    """Yield why codes of trained weights cannot be followed; `unrotated` names what no rotation goes with."""
    trained = injection is not None and "training" in injection.apply_during.weight
    named = [injection.weight, *(row.weight for row in injection.by_pattern)] if injection and trained else []
    formats = [fmt for fmt in named if isinstance(fmt, Format) and fmt.scale != "none"]
    if not formats:
        yield "no weight has codes in training; name a format for injection.weight, or leave it out"
    if injection is not None and injection.schedule is not None and injection.schedule.weight is not None:
        yield "injection.schedule.weight changes the codes over the steps; leave one of both out"
    for fmt in formats:
        if fmt.rounding == "stochastic":
            yield f"the codes of {fmt.name} are drawn anew in each step; take a format with nearest rounding"
        if unrotated and (fmt.rotation or fmt.coarse):
            yield f"{fmt.name} with a rotation or coarse scale: a level is of no weight alone; leave {unrotated} out"
