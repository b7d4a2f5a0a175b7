"""How a budget is divided: the final has its time first, and screening gets the candidates that fit into the rest.

It is decided once, when the first candidates have run: by their seconds a step, of which the dearest counts. What is
left after that is for safety: runs differ in length, and the last of a wave leaves workers idle.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median

from fp4rl.lab.search.records import Planned, Round
from fp4rl.spec.space import Space
from fp4rl.spec.words import counted

FIRST = 4  # candidates of the first batch, whose pace the plan is made by
BATCH = 8  # candidates of each later batch that TPE draws
SAFETY = 1.1  # times the final's own estimate: its preflight, and runs that take longer than those before


@dataclass(frozen=True)
class Pace:
    """Seconds of one run: a step of a candidate (the usual and the dearest), and all stages of one seed."""

    usual_s: float
    dearest_s: float
    stages_s: float
    control: float  # steps of the control for each of the recipe
    wave_s: float  # to start workers, and until the last of them ends

    @classmethod
    def of(cls, paces: Sequence[float], stages_s: float, control: float, wave_s: float = 10.0) -> "Pace":
        """Return the pace by seconds a step of some candidates."""
        return cls(median(paces), max(paces), stages_s, control, min(max(wave_s, 5.0), 60.0))

    def final_s(self, space: Space, seeds: int, jobs: int) -> float:
        """Return what the final takes over so many seeds: stages, recipe and control of each."""
        steps = space.screening.rungs[-1]
        control = self.usual_s * steps * self.control
        each = self.stages_s + self.dearest_s * steps + control
        return SAFETY * each * ceil(3 * seeds / jobs) / 3 + 2 * self.wave_s

    def round_s(self, round_: Round, jobs: int) -> float:
        """Return what a round takes."""
        return self.usual_s * round_.steps * (round_.candidates + round_.extra) / jobs + self.wave_s


def sizes(space: Space, candidates: int, last: int | None = None) -> tuple[Round, ...]:
    """Return the rounds of so many candidates: one in `one_in` goes on, at least two until the last. Further runs for
    close ones: as many as go on, and in the last round `last` of them, by default one for each candidate."""
    rungs, rounds, count = space.screening.rungs, [], candidates
    further = len(space.screening.seeds) - 1
    for number, steps in enumerate(rungs):
        after = min(count, max(2, ceil(count / space.screening.one_in)))
        extra = after
        if number == len(rungs) - 1:
            extra = count if last is None else min(last, count * further)
        rounds.append(Round(steps=steps, candidates=count, extra=extra if further else 0))
        count = after
    return tuple(rounds)


def screening_s(space: Space, rounds: Sequence[Round], pace: Pace, jobs: int) -> float:
    """Return what all rounds take: stages are trained once for each seed."""
    stages = pace.stages_s * len(space.screening.seeds) / min(jobs, 2)
    batches = 1 if space.sampler == "grid" else ceil(max(0, rounds[0].candidates - FIRST) / BATCH)
    waves = pace.wave_s * (batches + min(len(space.screening.seeds) - 1, 2) * len(rounds))
    return stages + waves + sum(pace.round_s(own, jobs) for own in rounds)


def smallest_s(space: Space, pace: Pace, jobs: int, used_s: float = 0.0, ran: int = 0) -> float:
    """Return the smallest budget that does: what is used, the first candidates through all rounds, and the whole final.

    Of the first round `ran` candidates have run, with the stages of its seed.
    """
    first = min(FIRST, space.size or FIRST)
    done_s = pace.usual_s * space.screening.rungs[0] * ran / jobs + (pace.stages_s / min(jobs, 2) if ran else 0.0)
    left_s = screening_s(space, sizes(space, first), pace, jobs) - done_s
    return used_s + max(left_s, 0.0) + pace.final_s(space, len(space.final.seeds), jobs)


def plan(space: Space, pace: Pace, budget_s: float, used_s: float, jobs: int) -> Planned:
    """Return how a budget is divided. Where it does not hold the final, that gets the seeds that fit, at least two."""
    most = min(space.screening.candidates, space.size or space.screening.candidates)
    seeds = len(space.final.seeds)
    fits = used_s + pace.final_s(space, seeds, jobs)
    while seeds > 2 and fits > budget_s:
        seeds -= 1
        fits = used_s + pace.final_s(space, seeds, jobs)
    first = min(FIRST, most)
    left = budget_s - fits + pace.usual_s * space.screening.rungs[0] * first / jobs  # those have run

    def fits_in(rounds: Sequence[Round]) -> bool:
        return screening_s(space, rounds, pace, jobs) <= left

    count = next((count for count in range(most, first, -1) if fits_in(sizes(space, count))), first)
    rounds = sizes(space, count)
    for more in range(rounds[-1].extra, rounds[-1].candidates * len(space.screening.seeds)):
        rounds = sizes(space, count, more) if fits_in(sizes(space, count, more)) else rounds
    return Planned(
        budget_s=budget_s,
        jobs=jobs,
        pace_s=round(pace.usual_s, 4),
        stages_s=round(pace.stages_s, 3),
        wave_s=round(pace.wave_s, 3),
        final_s=round(pace.final_s(space, seeds, jobs), 1),
        final_seeds=space.final.seeds[:seeds],
        rounds=rounds,
        why="; ".join(_in_words(space, rounds, seeds, most)),
    )


def _in_words(space: Space, rounds: Sequence[Round], seeds: int, most: int) -> Iterator[str]:
    each = ", ".join(f"{own.candidates} at {counted(own.steps, 'step')}" for own in rounds)
    short = f", of {most} that there are" if rounds[0].candidates < most else ""
    yield f"rounds of {each}{short}"
    missing = len(space.final.seeds) - seeds
    yield f"the final over {counted(seeds, 'seed')}" + (f", {missing} fewer than the file names" if missing else "")
