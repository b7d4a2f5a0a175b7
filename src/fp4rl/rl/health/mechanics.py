"""Checks of the mechanics: NaN and infinity, gradients that explode or vanish, a sampler that is another policy."""

from math import isfinite

from fp4rl.rl.health.findings import OK, Verdict, worst
from fp4rl.rl.health.histories import SignalHistories, solved
from fp4rl.rl.health.learning import lost
from fp4rl.spec.health import Thresholds

_MUST_BE_FINITE = ("loss", "grad_norm", "entropy", "reward", "length", "mismatch_kl")
_RECENT = 20
_AGO = 3
_WINDOW = 3
# A described part below this share of the limit counts as none.
_NOTHING = 0.1
_MEASURES = {
    "kl": "KL(rollout || train) {:.3g} nats a token",
    "probability": "token probabilities differ by {:.3g} on average between sampler and trainer",
}


def not_a_number(histories: SignalHistories, t: Thresholds) -> Verdict:  # noqa: ARG001
    """Find NaN or infinity in what drives the update: every number after it is worthless."""
    broken = [
        f"{name} is {histories.now[name]}" for name in _MUST_BE_FINITE if not isfinite(histories.now.get(name, 0.0))
    ]
    return Verdict("alarm", ", ".join(broken)) if broken else OK


def gradient(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Find gradients that explode or vanish. A spike is a watch; with a loss of accuracy, or when huge, an alarm."""
    return worst([_burst(histories, t), _vanished(histories, t)])


def _burst(histories: SignalHistories, t: Thresholds) -> Verdict:
    enough = max(3, histories.width())  # a prompt whose answers all earn the same has next to no gradient
    now, usual = histories.value("grad_norm"), histories["grad_norm"].level(_RECENT, _AGO, least=enough)
    if now is None or usual is None or usual <= 0 or now < t.gradient_ratio * usual:
        return OK
    evidence = f"gradient norm {now:.3g}, {now / usual:.2g}x its recent median {usual:.3g}"
    drop = lost(histories, t).share
    if drop >= t.accuracy_drop_watch:
        return Verdict("alarm", f"{evidence}; accuracy lost {drop:.0%} of its best")
    return Verdict("alarm" if now >= t.gradient_burst * usual else "watch", evidence)


def _vanished(histories: SignalHistories, t: Thresholds) -> Verdict:
    now, start = histories.value("grad_norm"), histories["grad_norm"].early(_RECENT)
    if now is None or start is None or start <= 0 or now > t.gradient_gone * start:
        return OK
    evidence = f"gradient norm {now:.3g} after {start:.3g} in the beginning"
    return Verdict("watch" if solved(histories, t) else "alarm", evidence)


def mismatch(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Find a sampler that is another policy than the one that is trained, without a correction for it.

    It goes by measurements only: the formats of both phases are compared on the same tokens, and described noise,
    hardware errors and stochastic rounding are measured as they act.
    """
    phases = histories["mismatch_phases"].level(_WINDOW, least=1)
    if phases is not None and phases >= t.mismatch_phases:
        return _unless_corrected(
            histories, t, f"rollout and training round differently: KL {phases:.3g} nats a token between them"
        )
    # A divergence grows with the square of a difference, so that its tolerance is squared.
    apart = [_apart(histories, t, "kl", t.described**2), _apart(histories, t, "probability", t.described)]
    return worst(apart)


def _apart(histories: SignalHistories, t: Thresholds, measure: str, times: float) -> Verdict:
    """Compare one measure of the mismatch with its limit plus `times` the part that is described or due to decoding.

    The median of the last few steps counts, since few tokens dominate the estimate of one step.
    """
    signal = f"mismatch_{measure}"
    now = histories[signal].level(max(_WINDOW, histories.width()), least=1) if signal in histories.now else None
    most: float = getattr(t, signal)
    if now is None or now < most:
        return OK
    words, foreseen = _MEASURES[measure].format(now), _measured(histories, f"described_{measure}")
    if foreseen is None:
        return _unless_corrected(histories, t, f"{words}; the log does not tell why")
    decoding = _measured(histories, f"decoding_{measure}") or 0.0
    if now >= most + times * (foreseen + decoding):
        parts = f"{foreseen:.3g} of it as described, {decoding:.3g} by decoding token by token"
        return _unless_corrected(histories, t, f"{words}, {parts}; the rest is not explained")
    if measure == "kl" and now >= t.mismatch_noise:
        return _unless_corrected(histories, t, f"{words}, as described, but too much to learn from")
    if foreseen < _NOTHING * most:
        beside = "made by decoding token by token (same weights and rounding); see rollout_correction"
        return Verdict("watch", f"{words}, {beside}")
    return OK  # the described noise, errors and stochastic rounding explain it


def _measured(histories: SignalHistories, part: str) -> float | None:
    """Return the largest of the last measurements of a part of the mismatch; None where it is not measured."""
    return max(histories[part].values[-_WINDOW:], default=None)


def _unless_corrected(histories: SignalHistories, t: Thresholds, words: str) -> Verdict:
    """Return a watch instead of an alarm where importance weights correct for it with enough effective samples."""
    effective = histories["effective"].level(_WINDOW, least=1) if "effective" in histories.now else None
    if effective is not None and effective >= t.effective:
        return Verdict("watch", f"{words}; rollout_correction makes up for it (effective sample size {effective:.0%})")
    return Verdict("alarm", words)
