"""The order of candidates by accuracy and KL together, and which of them are too close to tell apart.

An accuracy of few problems and seeds is noisy. Each is pulled towards what the KL of the candidates predicts for it,
the more the noisier it is: the estimator of R. E. Fay and R. A. Herriot (JASA 74 (1979)) for small areas, with log KL
as its predictor. Where KL tells nothing, or less of it is worse, all are pulled towards their mean, which leaves the
order of equally measured candidates to accuracy alone and keeps one lucky seed from beating the mean of several.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from fp4rl.lab.search.records import Measured
from fp4rl.lab.statistics.crossed import Scores, two_way, varying
from fp4rl.lab.statistics.paired import paired
from fp4rl.lab.statistics.seeds import pooled

_FEWEST = 6  # candidates from which on KL may predict
_KNOWN = 4  # degrees of freedom from which on the spread between seeds counts as known
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Contender:
    """What one candidate measured in a round, by seed."""

    candidate: int
    runs: Mapping[int, Measured]

    @cached_property
    def share(self) -> float:
        """The accuracy, mean over its seeds."""
        return fmean(run.share for run in self.runs.values())

    @cached_property
    def kl(self) -> float | None:
        """The KL, mean over its seeds; None where it was not measured."""
        measured = [run.kl for run in self.runs.values() if run.kl is not None]
        return fmean(measured) if len(measured) == len(self.runs) else None

    def table(self, seeds: Iterable[int]) -> Scores:
        """Return the share of samples solved, [seeds, problems]."""
        return np.array([self.runs[seed].solved for seed in seeds], dtype=np.float64) / self._samples

    @property
    def _samples(self) -> int:
        return next(iter(self.runs.values())).samples


@dataclass(frozen=True)
class Gap:
    """How far the first of two candidates lies above the second, in shares, with its interval."""

    value: float
    low: float
    high: float

    @property
    def open(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high


def gap(first: Contender, second: Contender) -> Gap:
    """Compare two candidates on the seeds and problems that both have: over problems alone with one seed or where
    nothing varies, else over seeds and problems."""
    seeds = [seed for seed in first.runs if seed in second.runs]
    ours, theirs = first.table(seeds), second.table(seeds)
    if len(seeds) > 1 and varying(ours, theirs):
        both = two_way(ours, theirs)
        return Gap(both.value, both.low, both.high)
    over = paired(ours.mean(0).tolist(), theirs.mean(0).tolist())
    return Gap(over.value, over.low, over.high)


def ranked(contenders: Sequence[Contender]) -> list[Contender]:
    """Return candidates from best to worst, as the module says."""
    if not contenders:
        return []
    pulled = dict(zip((own.candidate for own in contenders), _pulled(contenders), strict=True))
    return sorted(contenders, key=lambda own: (-pulled[own.candidate], -own.share, own.kl or 0.0, own.candidate))


def _pulled(contenders: Sequence[Contender]) -> list[float]:
    """Return the accuracy of each candidate, pulled towards what KL predicts (Fay and Herriot, EBLUP)."""
    shares = np.array([own.share for own in contenders])
    noise = _noise(contenders)
    kls = [own.kl for own in contenders if own.kl]
    flat = np.ones((len(shares), 1))
    if len(kls) == len(shares) >= _FEWEST and len(set(kls)) > 1:
        logs = np.log(kls)
        sloped = np.column_stack([flat, logs - logs.mean()])
        spread, line = _fitted(shares, sloped, noise)
        if line[1] < 0:
            return _between(shares, sloped @ line, spread, noise)
    spread, line = _fitted(shares, flat, noise)
    return _between(shares, flat @ line, spread, noise)


def _between(shares: _Floats, predicted: _Floats, spread: float, noise: _Floats) -> list[float]:
    own = spread / (spread + noise)
    return [float(value) for value in own * shares + (1 - own) * predicted]


def _fitted(shares: _Floats, predictors: _Floats, noise: _Floats) -> tuple[float, _Floats]:
    """Return the variance of true accuracies around the line, and the line: that at which the squared residuals over
    their variances come to as many as there are degrees of freedom."""
    freedom: int = len(shares) - predictors.shape[1]

    def line_at(spread: float) -> _Floats:
        weights = 1 / (spread + noise)
        solved = np.linalg.lstsq(predictors * np.sqrt(weights)[:, None], shares * np.sqrt(weights), rcond=None)
        return np.asarray(solved[0], dtype=np.float64)

    def excess(spread: float) -> float:
        residuals = shares - predictors @ line_at(spread)
        return float(np.sum(residuals**2 / (spread + noise))) - freedom

    low, high = 0.0, float(np.var(shares)) * len(shares) + 1e-9
    if freedom <= 0 or excess(0.0) <= 0:
        return 0.0, line_at(0.0)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low, line_at(low)


def _noise(contenders: Sequence[Contender]) -> _Floats:
    """Return the variance of each accuracy by chance: that of single runs, by problems and by seeds, over its seeds.

    What all candidates find hard is no noise between them; the rest of the answers is. Where enough of them have
    several seeds, the spread of these counts, if it is larger.
    """
    seeds = [next(iter(own.runs)) for own in contenders]
    table = np.concatenate([own.table([seed]) for own, seed in zip(contenders, seeds, strict=True)])  # [runs, problems]
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    freedom = max(1, (table.shape[0] - 1) * (table.shape[1] - 1))
    single = float((rest**2).sum()) / freedom / table.shape[1]
    between = pooled([[run.share for run in own.runs.values()] for own in contenders])
    if between is not None and between.freedom >= _KNOWN:
        single = max(single, between.sd**2)
    return np.array([max(single, 1e-8) / len(own.runs) for own in contenders])


def close(contender: Contender, others: Iterable[Contender]) -> bool:
    """Return whether one of the others cannot be told from the candidate."""
    return any(gap(contender, other).open for other in others)


def contested(order: Sequence[Contender], keep: int) -> list[Contender]:
    """Return those on both sides of the cut behind the first `keep` that could change sides, nearest to it first."""
    kept, dropped = order[:keep], order[keep:]
    if not (kept and dropped):
        return []
    inside = [own for own in reversed(kept) if close(own, dropped[:1])]
    outside = [own for own in dropped if close(own, kept[-1:])]
    pairs = [own for pair in zip(inside, outside, strict=False) for own in pair]
    return [*pairs, *inside[len(outside) :], *outside[len(inside) :]]
