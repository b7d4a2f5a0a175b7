"""What else stands between a reported number and a conclusion: stated confounds, and those its own fields show."""

from collections.abc import Iterator, Sequence
from statistics import median

from fp4rl.lab.audit.records import Record, Reports

ONE_RUN = "one run: the training seed is not varied"
_IMPLAUSIBLE_START = 30.0  # points above what other runs of the same model score before the first step
_TOLD_APART = 1.0  # points by which a peak must lie above the final number to be worth a word


def confounds(record: Record, reports: Reports) -> tuple[str, ...]:
    """List what is stated in the file, then what the fields themselves show."""
    return (*record.confounds, *_from_fields(record, reports))


def _from_fields(record: Record, reports: Reports) -> Iterator[str]:
    if record.final_accuracy is None:
        yield f"no final number ({record.status or 'no status'})"
        return
    if not record.counts_as_result:
        yield f"status: {record.status}"
    yield ONE_RUN
    yield from _final_step(record)
    yield from _final_value(record, reports.gsm8k_test_n)
    yield from _curve(record)
    yield from _start(record, reports.records)


def _final_step(record: Record) -> Iterator[str]:
    if record.final_step is None:
        yield "the step of the final number is not recorded"
    elif record.steps is not None and record.final_step != record.steps:
        yield f"final is step {record.final_step} of {record.steps}"


def _final_value(record: Record, problems: int) -> Iterator[str]:
    final = record.final_accuracy or 0.0
    decimals = len(f"{final:.2f}".rstrip("0").partition(".")[2])
    if abs(final - 100 * record.solved(problems) / problems) > 0.5001 * 10.0**-decimals:
        yield f"{final:g} % is no whole number of {problems} problems"


def _curve(record: Record) -> Iterator[str]:
    if not record.curve:
        yield "no curve is reported"
        return
    final, (last_step, _) = record.final_accuracy or 0.0, record.curve[-1]
    logged = record.logged_final
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
