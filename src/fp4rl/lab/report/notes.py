"""Notes beside the numbers: what a reader must know, each in one sentence that is computed from the runs."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, stdev

from fp4rl.lab.compare.comparison import Answer
from fp4rl.lab.compare.controls import lacking
from fp4rl.lab.report.scores import Score
from fp4rl.lab.report.starts import copied_starts, low_starts
from fp4rl.lab.spec_warnings import spec_warnings
from fp4rl.lab.suites import SuiteRun, SuiteRuns
from fp4rl.spec.words import agreeing, counted


def notes(suite: SuiteRuns, scores: Sequence[Score], questions: Sequence[Answer]) -> tuple[str, ...]:
    """Return the notes: first what is missing or does not count, then what the numbers are based on."""
    runs = suite.runs
    return (
        *_missing(runs),
        *(
            f"Not comparable, left out of every mean: {_named([run])} ({'; '.join(run.gaps)})."
            for run in runs
            if run.gaps
        ),
        *_otherwise(runs),
        *(f"Known beforehand: {line}." for line in spec_warnings({r.planned.arm: r.planned.experiment for r in runs})),
        *_warned(runs),
        *_mixed(scores),
        *_before(scores),
        *low_starts(runs),
        *copied_starts(runs),
        *_spread(scores),
        *_sampling(runs),
        *_controls(suite, questions),
        *_scope(runs, questions),
        *_not_planned(suite.not_planned),
    )


def _missing(runs: Sequence[SuiteRun]) -> Iterator[str]:
    without = [run for run in runs if run.run is None]
    if without:
        by_word: dict[str, list[SuiteRun]] = {}
        for run in without:
            by_word.setdefault(run.status.word, []).append(run)
        named = "; ".join(f"{word}: {_named(own)}" for word, own in by_word.items())
        yield f"Partial: {len(runs) - len(without)} of {counted(len(runs), 'run')}; {named}."


def _otherwise(runs: Sequence[SuiteRun]) -> Iterator[str]:
    """Yield notes on runs of other code, and on those that the monitor ended or rolled back."""
    stale = [run for run in runs if run.stale]
    if stale:
        finished = sum(run.state == "finished" for run in runs)
        which = f"all {counted(finished, 'run')}" if len(stale) == finished else _named(stale)
        yield f"Stale, computed by other code than this: {which}; `fp4rl run --rerun-stale` repeats them."
    skipped = [run for run in runs if run.run is not None and run.run.result.preflight == "skipped"]
    if skipped:
        yield f"The preflight was skipped of {_named(skipped)}: nobody looked for known traps beforehand."
    for run in runs:
        if run.run is not None and run.run.result.stopped:
            yield f"Ended early by the monitor: {_named([run])} ({run.run.result.stopped})."
    back = [run for run in runs if run.run and (health := run.run.result.evidence.health) and health.rollbacks]
    if back:
        yield f"Rolled back by the monitor and continued at a lower learning rate: {_named(back)}."


def _warned(runs: Sequence[SuiteRun]) -> Iterator[str]:
    """Yield the warnings of runs: of lines that differ in numbers alone the first, with the runs that had it."""
    by_kind: dict[str, list[tuple[str, SuiteRun]]] = {}
    for run in runs:
        for line in run.run.warnings if run.run is not None else ():
            if not line.startswith("rolled back"):  # which has a note of its own
                by_kind.setdefault(re.sub(r"\d[\d.]*", "#", line), []).append((line, run))
    for lines in by_kind.values():
        (first, teller), *_ = lines
        others = list({run.planned.run_id: run for _, run in lines if run is not teller}.values())
        more = f"; similar in {_named(others)}" if others else ""
        yield f"Warning of {_named([teller])}: {first.rstrip('.')}{more}."


def _mixed(scores: Sequence[Score]) -> Iterator[str]:
    """Yield a note on every mean over runs that were rounded differently under one name."""
    for score in scores:
        counted_in = (own.end.profile for own in score.by_seed if own.run.counts and own.end is not None)
        tables = sorted({profile.sites_digest or "none" for profile in counted_in})
        if len(tables) > 1:
            named = ", ".join(tables)
            yield f"Runs of {score.name} were rounded differently (site tables {named}): its mean mixes them."


def _before(scores: Sequence[Score]) -> Iterator[str]:
    """Yield a note on accuracy and format before training, by profile."""
    starts: dict[tuple[str, float], None] = {}
    for score in scores:
        if score.before is not None:
            start = score.by_seed[0].start
            precision = start.profile.precision if start is not None else None
            starts[precision or score.profile, round(score.before.value, 1)] = None
    if starts:
        shown = ", ".join(f"{value:.1f} % ({precision})" for precision, value in starts)
        formats = [s.formatted_before.value for s in scores if s.formatted_before is not None]
        answers = f"; {min(formats):.0f} % of the answers had the asked format" if formats else ""
        yield f"Before training (step 0): {shown}{answers}."


def _spread(scores: Sequence[Score]) -> Iterator[str]:
    spreads = {s.name: stdev(s.values) for s in scores if len(s.values) > 1}
    if spreads and not any(spreads.values()):
        yield "Runs that differ in the seed alone came out equal: here is no chance to measure an effect against."
    elif spreads:
        low, high = min(spreads, key=spreads.__getitem__), max(spreads, key=spreads.__getitem__)
        span = f"{spreads[low]:.1f} ({low}) to {spreads[high]:.1f} points ({high})"
        yield f"Runs that differ in the seed alone spread by a standard deviation of {span}."


def _sampling(runs: Sequence[SuiteRun]) -> Iterator[str]:
    updates = {run.planned.experiment.training.updates_per_step for run in runs}
    if updates == {1}:
        yield "One update is made from each rollout: the probability ratio is always 1, so clip-higher never acted."
    elif share := _mean_of(runs, "clip_ratio/high"):
        shown = " or ".join(map(str, sorted(updates)))
        yield f"{shown} updates are made from each rollout; clip-higher cut {100 * share:.2f} % of the tokens."
    dropped, batches = _mean_of(runs, "sampling/dropped_share"), _mean_of(runs, "sampling/gen_batches")
    if dropped and batches:
        yield (
            f"Dynamic sampling dropped {100 * dropped:.0f} % of the groups (all answers equal), "
            f"at {batches:.1f} generations a step."
        )


def _controls(suite: SuiteRuns, questions: Sequence[Answer]) -> Iterator[str]:
    """Yield a note on every question that lacks a control of equal budget."""
    for missing in lacking(questions, suite.folder):
        yield f"Unequal budget: {missing.sentence()} (`fp4rl compare {suite.folder.name}` prints it)."


def _scope(runs: Sequence[SuiteRun], questions: Sequence[Answer]) -> Iterator[str]:
    if len({run.planned.seed for run in runs}) > 1:
        linked = any(run.planned.needs for run in runs)
        yield (
            f"All seeds start from the same model{' at their first stage' if linked else ''}: the intervals cover the "
            "chance in training it, not other models, tasks or longer runs."
        )
    if len(questions) > 1:
        yield f"The {len(questions)} questions are those that suite.yaml names, corrected as one family (Holm)."


def _not_planned(others: Sequence[str]) -> Iterator[str]:
    """Yield a note on run folders that are not planned: runs get other ids when their description changes."""
    if others:
        folders = f"{counted(len(others), 'run folder')} {agreeing(len(others), 'is', 'are')}"
        named = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        yield f"{folders} not asked for by the present suite.yaml, and left alone: {named}."


def _mean_of(runs: Iterable[SuiteRun], metric: str) -> float | None:
    """Return the mean of a metric over steps and runs, without NaN."""
    values = [step[metric] for run in runs for step in run.curves.values() if metric in step]
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else None


def _named(runs: Sequence[SuiteRun]) -> str:
    shown = [f"{run.planned.arm} seed {run.planned.seed}" for run in runs]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
