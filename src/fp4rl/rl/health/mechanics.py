"""Checks on the machine: numbers that are none, gradients that burst or vanish, a sampler that is another policy."""

from dataclasses import dataclass
from math import isfinite

from fp4rl.rl.health.courses import Courses, solved
from fp4rl.rl.health.findings import OK, Verdict, worst
from fp4rl.rl.health.loss import lost
from fp4rl.spec.health import Thresholds

_MUST_BE_FINITE = ("loss", "grad_norm", "entropy", "reward", "length", "mismatch_kl")
_RECENT = 20
_AGO = 3
_WINDOW = 3
# A part of the mismatch below this share of what would be an illness is none.
_NOTHING = 0.1


def not_a_number(courses: Courses, t: Thresholds) -> Verdict:  # noqa: ARG001
    """A NaN or an infinity in what drives the update: every number after it is worthless."""
    broken = [f"{name} is {courses.now[name]}" for name in _MUST_BE_FINITE if not isfinite(courses.now.get(name, 0.0))]
    return Verdict("alarm", ", ".join(broken)) if broken else OK


def gradient(courses: Courses, t: Thresholds) -> Verdict:
    """A spike passes (watch); divergence stays and takes accuracy along; no gradient at all means no learning."""
    return worst([_burst(courses, t), _vanished(courses, t)])


def _burst(courses: Courses, t: Thresholds) -> Verdict:
    now, usual = courses.value("grad_norm"), courses["grad_norm"].recent(_RECENT, _AGO)
    if now is None or usual is None or usual <= 0 or now < t.gradient_ratio * usual:
        return OK
    evidence = f"gradient norm {now:.3g}, {now / usual:.2g}x its recent median {usual:.3g}"
    drop = lost(courses, t).share
    if drop >= t.harm:
        return Verdict("alarm", f"{evidence}; accuracy lost {drop:.0%} of its best")
    return Verdict("alarm" if now >= t.gradient_burst * usual else "watch", evidence)


def _vanished(courses: Courses, t: Thresholds) -> Verdict:
    now, start = courses.value("grad_norm"), courses["grad_norm"].early(_RECENT)
    if now is None or start is None or start <= 0 or now > t.gradient_gone * start:
        return OK
    evidence = f"gradient norm {now:.3g} after {start:.3g} in the beginning"
    return Verdict("watch" if solved(courses, t) else "alarm", evidence)


def mismatch(courses: Courses, t: Thresholds) -> Verdict:
    """Answers were sampled from another policy than the one that is trained on them, and nothing makes up for it.

    Only what was measured is named: the formats of two phases are held against each other on the same tokens, and the
    noise, hardware errors and stochastic rounding that are described are measured as they act.
    """
    phases = courses["mismatch_phases"].lately(_WINDOW)
    if phases is not None and phases >= t.mismatch_phases:
        return _unless_corrected(
            courses, t, f"rollout and training round differently: KL {phases:.3g} nats a token between them"
        )
    return worst([_apart(courses, t, side) for side in _sides(t)])


@dataclass(frozen=True)
class _Side:
    """One measure of the mismatch: its signal, what of it is described and what decoding makes, how many times those
    are let pass, and a limit."""

    signal: str
    described: str
    decoding: str
    times: float
    most: float
    words: str


def _sides(t: Thresholds) -> tuple[_Side, _Side]:
    kl = "KL(rollout || train) {:.3g} nats a token"
    probability = "token probabilities differ by {:.3g} on average between sampler and trainer"
    return (
        # A divergence grows with the square of a difference, and is carried by few tokens.
        _Side("mismatch_kl", "described_kl", "decoding_kl", t.described**2, t.mismatch_kl, kl),
        _Side(
            "mismatch_probability",
            "described_probability",
            "decoding_probability",
            t.described,
            t.mismatch_probability,
            probability,
        ),
    )


def _apart(courses: Courses, t: Thresholds, side: _Side) -> Verdict:
    """The median of the last few steps, since the estimate of one step is carried by few tokens."""
    width = max(_WINDOW, courses.width())
    now = courses[side.signal].lately(width) if side.signal in courses.now else None
    if now is None or now < side.most:
        return OK
    found, foreseen = side.words.format(now), _measured(courses, side.described)
    if foreseen is None:
        return _unless_corrected(courses, t, f"{found}; the log does not tell why")
    decoding = _measured(courses, side.decoding) or 0.0
    if now >= side.most + side.times * (foreseen + decoding):
        parts = f"{foreseen:.3g} of it as described, {decoding:.3g} by decoding token by token"
        return _unless_corrected(courses, t, f"{found}, {parts}; the rest is not explained")
    if side.signal == "mismatch_kl" and now >= t.mismatch_noise:
        return _unless_corrected(courses, t, f"{found}, as described, but too much to learn from")
    if foreseen < _NOTHING * side.most:
        beside = "made by decoding token by token (same weights and rounding); see rollout_correction"
        return Verdict("watch", f"{found}, {beside}")
    return OK  # as large as the noise, the errors and the chance that are described make it


def _measured(courses: Courses, part: str) -> float | None:
    """A part of the mismatch by the last times that it was measured; None where nobody does."""
    values = courses[part].values[-_WINDOW:]
    return max(sum(values) / len(values), values[-1]) if values else None


def _unless_corrected(courses: Courses, t: Thresholds, found: str) -> Verdict:
    """Importance weights make up for another sampler for as long as they leave most of the answers their say."""
    effective = courses["effective"].lately(_WINDOW) if "effective" in courses.now else None
    if effective is not None and effective >= t.effective:
        return Verdict("watch", f"{found}; rollout_correction makes up for it (effective sample size {effective:.0%})")
    return Verdict("alarm", found)
