"""Read from a report's own fields the confounds of its number, and whether its noise was ever effective."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from fp4rl.lab.audit.records import Record, ReportedNoise, Reports

State = Literal["none asked for", "never run", "never effective", "not as named", "effective", "not known"]

ONE_RUN = "one run: the training seed is not varied"
_IMPLAUSIBLE_START = 30.0  # points above what other runs of the same model score before the first step
_TOLD_APART = 1.0  # points by which a peak must lie above the final number to be mentioned
_FEWEST_STAGES = 2  # the generator of the geometric schedule makes the first of `num_stages` intervals silent


def confounds(record: Record, reports: Reports) -> tuple[str, ...]:
    """List the confounds that the file states, then those that its fields show."""
    if record.final_accuracy is None:
        return (*record.confounds, f"no final number ({record.status or 'no status'})")
    return (
        *record.confounds,
        *([] if record.counts_as_result else [f"status: {record.status}"]),
        ONE_RUN,
        *_final(record, record.final_accuracy, reports.gsm8k_test_n),
        *_curve(record, record.final_accuracy),
        *_start(record, reports.records),
    )


def _final(record: Record, final: float, problems: int) -> Iterator[str]:
    if record.final_step is None:
        yield "the step of the final number is not recorded"
    elif record.steps is not None and record.final_step != record.steps:
        yield f"final is step {record.final_step} of {record.steps}"
    decimals = len(f"{final:.2f}".rstrip("0").partition(".")[2])
    if abs(final - 100 * record.solved(problems) / problems) > 0.5001 * 10.0**-decimals:
        yield f"{final:g} % is no whole number of {problems} problems"


def _curve(record: Record, final: float) -> Iterator[str]:
    if not record.curve:
        yield "no curve is reported"
        return
    (last_step, _), logged = record.curve[-1], record.logged_final
    if logged is not None and abs(final - logged) > 0.005:
        yield f"final {final:g} is not the curve's {logged:g} at step {record.final_step or record.steps}"
    elif last_step < (record.final_step or record.steps or 0):
        yield f"the curve ends at step {last_step}, before the final number"
    peak = max(value for _, value in record.curve)
    if peak - final >= _TOLD_APART:
        yield f"the peak {peak:g} lies {peak - final:.1f} points above the final number"


def _start(record: Record, records: Sequence[Record]) -> Iterator[str]:
    start = _at_start(record)
    others = [value for other in records if other.model == record.model and (value := _at_start(other)) is not None]
    if start is not None and len(others) > 2 and start - median(others) > _IMPLAUSIBLE_START:
        yield f"step 0 is {start:g}, where other runs of this model start at {median(others):g}: another run's number?"


def _at_start(record: Record) -> float | None:
    return next((value for step, value in record.curve or () if step == 0), None)


@dataclass(frozen=True)
class NoiseFinding:
    """Whether a record's noise was effective, and why."""

    state: State
    reasons: tuple[str, ...] = ()


def noise_finding(record: Record) -> NoiseFinding:
    """Return whether a record's noise was effective; `never effective` means sigma 0: a repeat of the arm without."""
    noise = record.aqn
    if not noise.enabled:
        return NoiseFinding("none asked for")
    never, other = tuple(_never(noise)), tuple(_not_as_named(noise))
    stated = (noise.effective_noise_reason,) if noise.effective_noise_reason else ()
    if noise.effective_noise is False:
        causes = [(reason, reason.split()[0].strip(":,").lower()) for reason in never]  # with their first words
        unstated = [reason for reason, cause in causes if not any(cause in text.lower() for text in stated)]
        return NoiseFinding("never effective", (*(stated or ("stated without a reason",)), *unstated))
    if never and noise.effective_noise is None:
        return NoiseFinding("never effective", never)
    if record.final_accuracy is None and not record.curve:
        return NoiseFinding("never run", ("no number is reported",))
    if never or other:
        return NoiseFinding("not as named", (*never, *other, *stated))
    return NoiseFinding("effective" if noise.effective_noise else "not known", stated)


def _never(noise: ReportedNoise) -> Iterator[str]:
    """Yield the settings because of which sigma is always 0."""
    if noise.epoch_aware:
        yield "epoch-aware: the generator is asked for step 0 of 1, its own silent interval, so sigma stays 0"
    if noise.sigma_start == 0:
        yield "sigma_start is 0"
    if noise.num_stages is not None and noise.num_stages < _FEWEST_STAGES:
        yield f"num_stages is {noise.num_stages}: the only interval is the silent one"
    multipliers = noise.layer_multipliers
    if isinstance(multipliers, dict) and multipliers and not any(multipliers.values()):
        yield "every layer multiplier is 0"


def _not_as_named(noise: ReportedNoise) -> Iterator[str]:
    """Yield the settings because of which there was other noise than the report names."""
    if noise.sigma_end == 0 and noise.sigma_start:
        yield "sigma_end is 0: a geometric fade to 0 is its first value once and 0 ever after"
    if noise.layer_multipliers and "never reached" in (noise.effective_noise_reason or ""):
        yield "the layer multipliers did not act: uniform noise under another name"
