"""The decisions of screening, each a function of the space and the records alone: who gets a further seed, who goes on,
and which candidate is judged."""

from collections.abc import Sequence

from fp4rl.lab.search import ranking
from fp4rl.lab.search.ranking import Contender
from fp4rl.lab.search.records import Added, Book, Chosen, Decided, Measured, called
from fp4rl.spec.space import Space
from fp4rl.spec.words import counted


def contenders(space: Space, book: Book, number: int, candidates: Sequence[int]) -> list[Contender]:
    """Return what candidates measured in a round, without those of which a run failed."""
    steps, lost = space.screening.rungs[number], failed(space, book, number, candidates)
    by_candidate: dict[int, dict[int, Measured]] = {own: {} for own in candidates if own not in lost}
    for (candidate, trained, seed), run in book.measured().items():
        if trained == steps and candidate in by_candidate:
            by_candidate[candidate][seed] = run
    return [Contender(own, by_seed) for own, by_seed in by_candidate.items() if by_seed]


def failed(space: Space, book: Book, number: int, candidates: Sequence[int]) -> dict[int, str]:
    """Return candidate -> why a run of it failed in a round."""
    steps = space.screening.rungs[number]
    runs = [own for own in book.measured().values() if own.steps == steps and own.candidate in candidates]
    return {own.candidate: own.failed for own in runs if own.failed is not None}


def added(space: Space, book: Book, number: int, seed: int, alive: Sequence[int], keep: int, left: int) -> Added | None:
    """Return which candidates get a further seed, of at most `left` runs; None where the cut is clear."""
    near = ranking.contested(ranking.ranked(contenders(space, book, number, alive)), keep)[: max(left, 0)]
    if len(near) < 2:
        return None
    over = "problems and seeds" if len(near[0].runs) > 1 else "problems"
    chosen = tuple(own.candidate for own in near)
    return Added(round=number, seed=seed, candidates=chosen, why=f"their intervals over {over} reach over the cut")


def decided(space: Space, book: Book, number: int, alive: Sequence[int], keep: int) -> Decided:
    """Return the end of a round: who goes on, best first, and why each of the others does not."""
    order = ranking.ranked(contenders(space, book, number, alive))
    kept, rest = order[:keep], order[keep:]
    lost = {str(own): f"failed: {why}" for own, why in failed(space, book, number, alive).items()}
    dropped = {str(own.candidate): _behind(own, kept[-1], keep) for own in rest}
    return Decided(round=number, kept=tuple(own.candidate for own in kept), dropped=dropped | lost)


def chosen(space: Space, book: Book, number: int, alive: Sequence[int]) -> Chosen:
    """Return the first of what is left, with those that its round could not tell from it."""
    steps = space.screening.rungs[number]
    every = contenders(space, book, number, [line.number for line in book.candidates()])
    first = next(own for own in every if own.candidate == alive[0])
    near = tuple(own.candidate for own in every if own is not first and ranking.close(own, [first]))
    over = f"{100 * first.share:.1f} % over {counted(len(first.runs), 'seed')} at {counted(steps, 'step')}"
    return Chosen(candidate=first.candidate, round=number, close=near, why=over)


def _behind(own: Contender, last: Contender, keep: int) -> str:
    """Return why a candidate does not go on, against the last that does."""
    between = ranking.gap(own, last)
    span = f"{100 * between.value:+.1f} points [{100 * between.low:+.1f}, {100 * between.high:+.1f}]"
    how = "too close to tell" if between.open else "worse"
    if between.value > 0 and own.kl is not None and last.kl is not None:
        how = f"within its noise, where KL {own.kl:.2g} against {last.kl:.2g} decides"
    return f"{100 * own.share:.1f} %; against {called(last.candidate)}, the last of {keep} kept, {span}: {how}"
