"""The figures of a suite's page: learning curves, accuracy and answers."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fp4rl.lab.compare.comparison import Answer
from fp4rl.lab.criteria import Verdict
from fp4rl.lab.report.collect import SuiteReport
from fp4rl.lab.report.evidence import NoiseStep, noise_steps
from fp4rl.lab.report.scores import Score
from fp4rl.lab.suites import SuiteRun
from fp4rl.pages.page import DASHES, SYMBOLS, Figure, Trace, in_rows, line, marks, over_steps

# title, metric, scale, unit
_CURVES = (
    ("Rollout accuracy, %", "accuracy/rollout", 100.0, "%"),
    ("Entropy, nats per token", "entropy", 1.0, ""),
    ("Response length, tokens", "response_length/mean", 1.0, ""),
)
MOST_POINTS = 300


@dataclass(frozen=True)
class Curve:
    """One metric of one arm: for each step the mean, the lowest and the highest value of its runs."""

    arm: str
    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: int


def curve(arm: str, metric: str, runs: Iterable[SuiteRun], scale: float = 1.0) -> Curve | None:
    """Return the curve over the arm's comparable runs, times `scale`; None where none logged the metric."""
    values: dict[int, list[float]] = defaultdict(list)
    seeds = 0
    for run in runs:
        if run.planned.arm != arm or not run.counts:
            continue
        own = {step: scale * logged[metric] for step, logged in run.curves.items() if metric in logged}
        finite = {step: value for step, value in own.items() if math.isfinite(value)}
        if finite:
            seeds += 1
            for step, value in finite.items():
                values[step].append(value)
    if not values:
        return None
    rows = _thinned([(float(step), fmean(at), min(at), max(at)) for step, at in sorted(values.items())])
    rows = [(row[0], *(float(f"{value:.5g}") for value in row[1:])) for row in rows]
    steps, mean, low, high = zip(*rows, strict=True)
    return Curve(arm, steps, mean, low, high, seeds)


def _thinned(rows: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Return at most MOST_POINTS rows, each the mean of its neighbours, so that pages of long runs stay small."""
    size = math.ceil(len(rows) / MOST_POINTS)
    groups = (rows[start : start + size] for start in range(0, len(rows), size))
    return [tuple(fmean(column) for column in zip(*group, strict=True)) for group in groups]


def learning(report: SuiteReport) -> list[Figure]:
    """Return figures of accuracy, entropy and length in the rollouts, and of sigma where some arm has noise."""
    figures = []
    for number, (title, metric, scale, unit) in enumerate(_CURVES):
        curves = [(i, c) for i, arm in enumerate(report.arms) if (c := curve(arm, metric, report.by_arm[arm], scale))]
        if curves:
            data = [trace for i, c in curves for trace in _band_and_line(i, c)]
            ends = "; ".join(f"{c.arm} from {c.mean[0]:.3g} to {c.mean[-1]:.3g} {unit}".strip() for _, c in curves)
            figures.append(Figure(f"curve-{number}", title, f"{title} by step: {ends}", data, over_steps()))
    noise = _sigma(report)
    return [*figures, noise] if noise else figures


def accuracy(report: SuiteReport) -> Figure | None:
    """Return a figure with a row per arm and profile: a dot per seed, the mean with its interval, and step 0."""
    rows = [score for score in report.scores if score.by_seed]
    if not rows:
        return None
    arms = list(report.arms)
    data = [trace for score in rows for trace in _score_traces(score, arms.index(score.arm))]
    words = "; ".join(f"{s.name} {s.after.value:.1f} %" for s in rows if s.after is not None)
    layout = in_rows([score.name for score in rows], "strict accuracy, %")
    return Figure("accuracy", "", f"Accuracy at the last step: {words}", data, layout)


def answers(questions: Sequence[Answer]) -> Figure | None:
    """Return a figure with a row per question: the difference with its interval, and the margin where one was fixed."""
    judged = [(f"question {i}", q.verdict) for i, q in enumerate(questions, 1) if q.verdict is not None]
    if not judged:
        return None
    data = [trace for name, verdict in judged for trace in _answer_traces(name, verdict)]
    layout = in_rows([name for name, _ in judged], "treatment minus control, points")
    zero = {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 1, "dash": "dot"}}
    layout["shapes"] = [zero]
    words = "; ".join(f"{name}: {verdict.sentence()}" for name, verdict in judged)
    return Figure("answers", "", words, data, layout)


def _band_and_line(number: int, c: Curve) -> Iterable[Trace]:
    if c.seeds > 1:
        around = {"fill": "toself", "line": {"width": 0}, "hoverinfo": "skip", "part": "band"}
        yield line([*c.steps, *reversed(c.steps)], [*c.high, *reversed(c.low)], c.arm, number, **around)
    pen = {"width": 2, "dash": DASHES[number % len(DASHES)]}
    mode = "lines" if len(c.steps) > 1 else "markers"
    yield line(c.steps, c.mean, c.arm, number, mode=mode, line=pen, hovertemplate="%{y:.4g}")


def _sigma(report: SuiteReport) -> Figure | None:
    """Return a figure of noise as scheduled (line) and as measured on the weights (marks), without steps at 0."""
    runs = {arm: [run.run for run in own if run.run is not None and run.counts] for arm, own in report.by_arm.items()}
    steps = {arm: [step for run in own for step in noise_steps(run)] for arm, own in runs.items()}
    noisy = {arm: [step for step in own if step.scheduled > 0] for arm, own in steps.items()}
    data = [trace for n, (arm, own) in enumerate(noisy.items()) if own for trace in _noise_traces(n, arm, own)]
    if not data:
        return None
    layout = over_steps() | {"yaxis": {"type": "log", "exponentformat": "power", "dtick": 1, "title": {"text": ""}}}
    words = f"Sigma asked and realised of {', '.join(arm for arm, own in noisy.items() if own)}"
    return Figure("sigma", "Noise on the weights in rollouts, sigma", words, data, layout)


def _noise_traces(number: int, arm: str, steps: Sequence[NoiseStep]) -> list[Trace]:
    at: dict[int, list[NoiseStep]] = defaultdict(list)
    for step in sorted(steps, key=lambda step: step.step):
        at[step.step].append(step)
    sigmas = [fmean(step.scheduled for step in group) for group in at.values()]
    measured = [[step.realised for step in group if step.realised is not None] for group in at.values()]
    realised = [fmean(values) if values else None for values in measured]
    steps_taken, hover = [step + 1 for step in at], {"hovertemplate": "%{y:.3g}"}
    dot = {"size": 6, "symbol": SYMBOLS[number % len(SYMBOLS)]}
    return [
        line(steps_taken, sigmas, f"{arm}, asked", number, line={"width": 2, "shape": "hvh"}, **hover),
        marks(steps_taken, realised, "dots", number, name=f"{arm}, realised", marker=dot, **hover),
    ]


def _score_traces(score: Score, number: int) -> Iterable[Trace]:
    if score.before is not None:
        hover = "step 0: %{x:.1f} %<extra></extra>"
        yield marks([score.before.value], [score.name], "start", None, marker=_tick(12, 2), hovertemplate=hover)
    for counts, symbol, note in (
        (True, SYMBOLS[number % len(SYMBOLS)], ""),
        (False, "x-thin-open", ", not comparable"),
    ):
        group = [s for s in score.by_seed if s.end is not None and s.run.counts == counts]
        if group:
            yield marks(
                [s.after and round(s.after, 2) for s in group],
                [score.name] * len(group),
                "dots",
                number,
                text=[f"seed {s.run.planned.seed}{note}{', stale' if s.run.stale else ''}" for s in group],
                marker={"symbol": symbol, "size": 8, "opacity": 0.6, "line": {"width": 2 if note else 0}},
                hovertemplate="%{text}: %{x:.1f} %<extra></extra>",
            )
    if score.after is not None:
        yield _interval(score.after.value, score.after.low, score.after.high, score.name, number)


def _answer_traces(name: str, verdict: Verdict) -> Iterable[Trace]:
    yield _interval(verdict.difference, verdict.low, verdict.high, name, None)
    if verdict.margin is not None:
        hover = "margin: %{x:.1f}<extra></extra>"
        yield marks([-verdict.margin], [name], "margin", None, marker=_tick(18, 3), hovertemplate=hover)


def _interval(value: float, low: float | None, high: float | None, row: str, number: int | None) -> Trace:
    error: dict[str, Any] = {"visible": False}
    span = f"{value:.1f}"
    if low is not None and high is not None:
        error = {"type": "data", "array": [high - value], "arrayminus": [value - low], "thickness": 2, "width": 5}
        span += f" [{low:.1f}, {high:.1f}]"
    hover = f"{span}<extra></extra>"
    return marks([value], [row], "mean", number, error_x=error, marker=_tick(16, 3), hovertemplate=hover)


def _tick(size: int, width: int) -> dict[str, Any]:
    return {"symbol": "line-ns-open", "size": size, "line": {"width": width}}
