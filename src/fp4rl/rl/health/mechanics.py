"""Checks on the machine: numbers that are none, gradients that burst or vanish, a sampler that is another policy."""

from math import isfinite

from fp4rl.rl.health.courses import Courses, lost, solved
from fp4rl.rl.health.findings import OK, Verdict, worst
from fp4rl.spec.health import Thresholds

_MUST_BE_FINITE = ("loss", "grad_norm", "entropy", "reward", "length", "mismatch_kl")
_RECENT = 20
_AGO = 3
_WINDOW = 3


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
    drop = lost(courses, t)
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
    """Answers were sampled from a policy other than the one that is trained on them."""
    phases = courses["mismatch_phases"].lately(_WINDOW)
    if phases is not None and phases >= t.mismatch_phases:
        return Verdict("alarm", f"rollout and training round differently: KL {phases:.3g} nats a token between them")
    found = _apart(courses, t)
    if not found or phases is None:
        return Verdict("alarm", found) if found else OK
    return _though_alike(courses, t, found)


def _though_alike(courses: Courses, t: Thresholds, found: str) -> Verdict:
    """Both sides round alike: what is left is the noise that was asked for, or arithmetic in low precision.

    Noise tips inputs of 4 bits over to the next value: runs that learn well have .04 nats a token.
    """
    if courses.value("sigma"):
        kl = courses["mismatch_kl"].lately(_WINDOW)
        if kl is not None and kl >= t.mismatch_noise:
            return Verdict("alarm", f"{found}; more than noise should do")
        return Verdict("watch", f"{found}: noise of the rollout; see rollout_correction")
    if _grew(courses, t):
        return Verdict("alarm", found)
    return Verdict("watch", f"{found}, though both round alike: low-precision arithmetic; see rollout_correction")


def _apart(courses: Courses, t: Thresholds) -> str:
    """What the sampler's own log-probabilities say; empty where they are close. The median of the last few steps, since
    the estimate of one step is carried by few tokens."""
    if courses.value("mismatch_kl") is None and courses.value("mismatch_probability") is None:
        return ""
    kl, probability = courses["mismatch_kl"].lately(_WINDOW), courses["mismatch_probability"].lately(_WINDOW)
    if kl is not None and kl >= t.mismatch_kl:
        return f"KL(rollout || train) {kl:.3g} nats a token: the sampler is another policy"
    if probability is not None and probability >= t.mismatch_probability:
        return f"token probabilities differ by {probability:.3g} on average between sampler and trainer"
    return ""


def _grew(courses: Courses, t: Thresholds) -> bool:
    start, now = courses["mismatch_kl"].early(_RECENT), courses["mismatch_kl"].lately(_WINDOW)
    return start is not None and now is not None and now >= t.mismatch_growth * start
