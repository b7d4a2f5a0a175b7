"""The page's figures as Plotly describes them: data and layout without colours, which the page takes from its theme.

Every trace says in `meta` which arm it shows (its number, or None) and what part it plays; the page's script paints it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fp4rl.lab.report.collect import SuiteReport
from fp4rl.lab.report.curves import Curve, curve
from fp4rl.lab.report.evidence import NoiseStep
from fp4rl.lab.report.questions import Question
from fp4rl.lab.report.runs import Run
from fp4rl.lab.report.scores import Score

Trace = dict[str, Any]

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross")
# title, metric, scale, unit
_CURVES = (
    ("Rollout accuracy, %", "accuracy/rollout", 100.0, "%"),
    ("Entropy, nats per token", "entropy", 1.0, ""),
    ("Response length, tokens", "response_length/mean", 1.0, ""),
)
_ROW = 34  # pixels of one row in a figure of rows


@dataclass(frozen=True)
class Figure:
    """One figure: `words` says for a screen reader what is drawn."""

    id: str
    title: str
    words: str
    data: list[Trace]
    layout: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "data": self.data, "layout": self.layout}


def learning(report: SuiteReport) -> list[Figure]:
    """Accuracy, entropy and length in the rollouts, and sigma where some arm has noise."""
    found = []
    for number, (title, metric, scale, unit) in enumerate(_CURVES):
        curves = [(i, c) for i, arm in enumerate(report.arms) if (c := curve(arm, metric, report.runs, scale))]
        if curves:
            data = [trace for i, c in curves for trace in _band_and_line(i, c)]
            found.append(Figure(f"curve-{number}", title, _course(title, curves, unit), data, _over_steps()))
    noise = _sigma(report)
    return [*found, noise] if noise else found


def accuracy(report: SuiteReport) -> Figure | None:
    """One row per arm and profile: a dot per seed, the mean with its interval, and where it stood at step 0."""
    rows = [score for score in report.scores if score.by_seed]
    if not rows:
        return None
    arms = list(report.arms)
    data = [trace for score in rows for trace in _score_traces(score, arms.index(score.arm))]
    words = "; ".join(f"{s.name} {s.after.value:.1f} %" for s in rows if s.after is not None)
    layout = _rows_layout([score.name for score in rows], "strict accuracy, %")
    return Figure("accuracy", "", f"Accuracy at the last step: {words}", data, layout)


def answers(questions: Sequence[Question]) -> Figure | None:
    """One row per question: the difference with its interval, and the margin where one was fixed."""
    judged = [(f"question {i}", q) for i, q in enumerate(questions, 1) if q.verdict is not None]
    if not judged:
        return None
    data = [trace for name, question in judged for trace in _answer_traces(name, question)]
    layout = _rows_layout([name for name, _ in judged], "treatment minus control, points")
    layout["shapes"] = [_zero_line()]
    words = "; ".join(f"{name}: {q.verdict.sentence()}" for name, q in judged if q.verdict)
    return Figure("answers", "", words, data, layout)


def _band_and_line(number: int, c: Curve) -> Iterable[Trace]:
    if c.seeds > 1:
        yield {
            "type": "scatter",
            "x": [*c.steps, *reversed(c.steps)],
            "y": [*c.high, *reversed(c.low)],
            "fill": "toself",
            "mode": "lines",
            "line": {"width": 0},
            "hoverinfo": "skip",
            "meta": {"arm": number, "part": "band"},
        }
    yield {
        "type": "scatter",
        "x": list(c.steps),
        "y": list(c.mean),
        "mode": "lines" if len(c.steps) > 1 else "markers",
        "name": c.arm,
        "line": {"width": 2, "dash": DASHES[number % len(DASHES)]},
        "hovertemplate": "%{y:.4g}",
        "meta": {"arm": number, "part": "line"},
    }


def _sigma(report: SuiteReport) -> Figure | None:
    """Noise as the schedule asked for it (line) and as measured on the weights (marks); silent steps are not drawn."""
    data: list[Trace] = []
    words = []
    for number, arm in enumerate(report.arms):
        steps = [step for run in report.runs if run.planned.arm == arm and run.counts for step in _noise(run)]
        if steps:
            data += _noise_traces(number, arm, steps)
            words.append(arm)
    if not data:
        return None
    layout = _over_steps() | {"yaxis": {"type": "log", "exponentformat": "power", "dtick": 1, "title": {"text": ""}}}
    title = "Noise on the weights in rollouts, sigma"
    return Figure("sigma", title, f"Sigma asked and realised of {', '.join(words)}", data, layout)


def _noise(run: Run) -> list[NoiseStep]:
    return [step for step in run.evidence.noise if step.asked > 0] if run.evidence else []


def _noise_traces(number: int, arm: str, steps: Sequence[NoiseStep]) -> list[Trace]:
    at: dict[int, list[NoiseStep]] = defaultdict(list)
    for step in sorted(steps, key=lambda step: step.step):
        at[step.step].append(step)
    asked = [fmean(step.asked for step in group) for group in at.values()]
    there = [[step.realised for step in group if step.realised is not None] for group in at.values()]
    line = {"mode": "lines", "y": asked, "line": {"width": 2, "shape": "hvh"}, "name": f"{arm}, asked"}
    marks = {
        "mode": "markers",
        "y": [fmean(values) if values else None for values in there],
        "marker": {"size": 6, "symbol": SYMBOLS[number % len(SYMBOLS)]},
        "name": f"{arm}, realised",
    }
    shared = {"type": "scatter", "x": [step + 1 for step in at], "hovertemplate": "%{y:.3g}"}
    return [
        shared | line | {"meta": {"arm": number, "part": "line"}},
        shared | marks | {"meta": {"arm": number, "part": "dots"}},
    ]


def _score_traces(score: Score, number: int) -> Iterable[Trace]:
    counted = [s for s in score.by_seed if s.end is not None and s.counts]
    others = [s for s in score.by_seed if s.end is not None and not s.counts]
    row = {"type": "scatter", "mode": "markers"}
    if score.before is not None:
        yield row | {
            "x": [score.before.value],
            "y": [score.name],
            "marker": {"symbol": "line-ns-open", "size": 12, "line": {"width": 2}},
            "hovertemplate": "step 0: %{x:.1f} %<extra></extra>",
            "meta": {"arm": None, "part": "start"},
        }
    for group, symbol, said in (
        (counted, SYMBOLS[number % len(SYMBOLS)], ""),
        (others, "x-thin-open", ", not comparable"),
    ):
        if group:
            yield row | {
                "x": [s.end.strict for s in group if s.end is not None],
                "y": [score.name] * len(group),
                "text": [f"seed {s.seed}{said}{', stale' if s.stale else ''}" for s in group],
                "marker": {"symbol": symbol, "size": 8, "opacity": 0.6, "line": {"width": 2 if said else 0}},
                "hovertemplate": "%{text}: %{x:.1f} %<extra></extra>",
                "meta": {"arm": number, "part": "dots"},
            }
    if score.after is not None:
        yield row | _interval(score.after.value, score.after.low, score.after.high, score.name, number)


def _answer_traces(name: str, question: Question) -> Iterable[Trace]:
    verdict = question.verdict
    assert verdict is not None
    row = {"type": "scatter", "mode": "markers"}
    yield row | _interval(verdict.difference, verdict.low, verdict.high, name, None)
    if verdict.margin is not None:
        yield row | {
            "x": [-verdict.margin],
            "y": [name],
            "marker": {"symbol": "line-ns-open", "size": 18, "line": {"width": 3}},
            "hovertemplate": "margin: %{x:.1f}<extra></extra>",
            "meta": {"arm": None, "part": "margin"},
        }


def _interval(value: float, low: float | None, high: float | None, row: str, number: int | None) -> Trace:
    error: dict[str, Any] = {"visible": False}
    if low is not None and high is not None:
        error = {"type": "data", "array": [high - value], "arrayminus": [value - low], "thickness": 2, "width": 5}
    return {
        "x": [value],
        "y": [row],
        "error_x": error,
        "marker": {"symbol": "line-ns-open", "size": 16, "line": {"width": 3}},
        "hovertemplate": f"{_span(value, low, high)}<extra></extra>",
        "meta": {"arm": number, "part": "mean"},
    }


def _span(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.1f}" + ("" if low is None or high is None else f" [{low:.1f}, {high:.1f}]")


def _over_steps() -> dict[str, Any]:
    return {
        "height": 260,
        "margin": {"l": 48, "r": 12, "t": 8, "b": 40},
        "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": ""}},
        "hovermode": "x unified",
        "showlegend": False,
    }


def _rows_layout(names: Sequence[str], title: str) -> dict[str, Any]:
    return {
        "height": _ROW * len(names) + 60,
        "margin": {"l": 8, "r": 16, "t": 8, "b": 44},
        "xaxis": {"title": {"text": title}},
        "yaxis": {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": list(reversed(names)),
            "automargin": True,
        },
        "hovermode": "closest",
        "showlegend": False,
    }


def _zero_line() -> dict[str, Any]:
    return {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 1, "dash": "dot"}}


def _course(title: str, curves: Sequence[tuple[int, Curve]], unit: str) -> str:
    ends = (f"{c.arm} from {c.mean[0]:.3g} to {c.mean[-1]:.3g} {unit}".strip() for _, c in curves)
    return f"{title} by step: {'; '.join(ends)}"
