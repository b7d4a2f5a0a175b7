"""Which combinations are tried next: those of a grid in their order, or what TPE draws by the first round so far.

A batch is a function of the space, the number of the batch and the batches before it, so that a search that goes on
after a kill proposes the same. The study in `search.db` is for Optuna's own tools: it follows the records.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fp4rl.lab.search.candidates import Recipes, grid, in_words
from fp4rl.lab.search.records import Book, Measured, Proposed
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.space import Range, Space

_TRIES = 20  # draws for each candidate of a batch; where all are refused or known, the space is exhausted
Trial = tuple[Proposed, Measured]


def require_optuna() -> None:
    """Raise NotFoundError, naming the extra, where Optuna is not installed."""
    try:
        _optuna()
    except ImportError:
        raise NotFoundError("a search needs Optuna, the extra `search`: pip install 'fp4rl[search]'") from None


@cache
def _optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def propose(recipes: Recipes, book: Book, batch: int, count: int) -> list[Proposed]:
    """Return the lines of a batch with `count` candidates, fewer where the space has no more; the refused among them.

    Combinations of earlier batches do not come again.
    """
    earlier = [line for line in book.of(Proposed) if line.batch < batch]
    seen = {tuple(line.point.items()) for line in earlier}
    known = {recipes.described(line.point): line.number for line in earlier if line.refused is None}
    lines: list[Proposed] = []
    accepted = 0
    for point in _points(recipes.space, _trials(book, earlier, recipes.space), batch, _TRIES * count):
        if accepted == count:
            break
        if tuple(point.items()) in seen:
            continue
        seen.add(tuple(point.items()))
        number = len(earlier) + len(lines)
        why = recipes.refused(point, known)
        lines.append(Proposed(number=number, batch=batch, point=point, words=in_words(point), refused=why))
        if why is None:
            accepted += 1
            known[recipes.described(point)] = number
    return lines


def _trials(book: Book, proposed: Sequence[Proposed], space: Space) -> list[Trial]:
    """Return the candidates that have run their first round, with what that measured."""
    measured, first, seed = book.measured(), space.screening.rungs[0], space.screening.seeds[0]
    pairs = ((line, measured.get((line.number, first, seed))) for line in proposed)
    return [(line, own) for line, own in pairs if own is not None and own.failed is None]


def _points(space: Space, trials: Sequence[Trial], batch: int, tries: int) -> Iterator[dict[str, str | float]]:
    if space.sampler == "grid":
        yield from grid(space)
        return
    optuna = _optuna()
    with_kl = all(own.kl is not None for _, own in trials)
    study = optuna.create_study(directions=_directions(with_kl), sampler=_sampler(space, batch))
    study.add_trials([_finished(space, trial, with_kl) for trial in trials])
    for _ in range(tries):
        yield dict(study.ask(fixed_distributions=_distributions(space)).params)


def _directions(with_kl: bool) -> list[str]:
    return ["maximize", "minimize"] if with_kl else ["maximize"]


def _sampler(space: Space, batch: int) -> Any:
    """Return TPE for one batch: it takes candidates of the batch that are not measured yet for bad ones."""
    seed = space.screening.seed * 100_003 + batch
    return _optuna().samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=10)


def _distributions(space: Space) -> dict[str, Any]:
    kinds = _optuna().distributions
    return {
        name: kinds.FloatDistribution(own.low, own.high, log=own.log)
        if isinstance(own, Range)
        else kinds.CategoricalDistribution([choice.name for choice in own])
        for name, own in space.space.items()
    }


def _finished(space: Space, trial: Trial, with_kl: bool) -> Any:
    proposed, measured = trial
    return _optuna().trial.create_trial(
        params=dict(proposed.point),
        distributions=_distributions(space),
        values=[measured.share, *([measured.kl] if with_kl else [])],
        user_attrs={"candidate": proposed.number, "words": proposed.words, "run": measured.run},
    )


def keep_study(space: Space, book: Book, file: Path) -> None:
    """Write the first round into the study of an SQLite file; one that does not follow the records is made anew."""
    optuna = _optuna()
    trials = _trials(book, book.of(Proposed), space)
    with_kl = bool(trials) and all(own.kl is not None for _, own in trials)
    storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
    try:
        if space.search in [own.study_name for own in optuna.get_all_study_summaries(storage)]:
            study = optuna.load_study(study_name=space.search, storage=storage)
            kept = [trial.user_attrs.get("candidate") for trial in study.trials]
            if kept != [line.number for line, _ in trials[: len(kept)]] or len(study.directions) != 1 + with_kl:
                optuna.delete_study(study_name=space.search, storage=storage)
        study = optuna.create_study(
            study_name=space.search, storage=storage, directions=_directions(with_kl), load_if_exists=True
        )
        study.add_trials([_finished(space, trial, with_kl) for trial in trials[len(study.trials) :]])
    finally:
        storage.remove_session()
        storage.engine.dispose()
