"""Was the noise of a reported experiment ever effective? Reasoned from its own fields."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fp4rl.lab.audit.records import Record, ReportedNoise

State = Literal["none asked for", "never run", "never effective", "not as named", "effective", "not known"]

# The generator of the geometric schedule makes the first of `num_stages` intervals silent.
_FEWEST_STAGES = 3


@dataclass(frozen=True)
class NoiseFinding:
    """What a record's noise came to, and why."""

    state: State
    reasons: tuple[str, ...] = ()


def noise_finding(record: Record) -> NoiseFinding:
    """Tell what the noise of a record came to.

    `never effective`: sigma was 0 on all weights at all steps, so the arm repeats the one without noise.
    """
    noise = record.aqn
    if not noise.enabled:
        return NoiseFinding("none asked for")
    never, other = tuple(_never(noise)), tuple(_not_as_named(noise))
    stated = (noise.effective_noise_reason,) if noise.effective_noise_reason else ()
    if noise.effective_noise is False:
        return NoiseFinding("never effective", (*(stated or ("stated without a reason",)), *_unstated(never, stated)))
    if never and noise.effective_noise is None:
        return NoiseFinding("never effective", never)
    if record.final_accuracy is None and not record.curve:
        return NoiseFinding("never run", ("no number is reported",))
    if never or other:
        return NoiseFinding("not as named", (*never, *other, *stated))
    return NoiseFinding("effective" if noise.effective_noise else "not known", stated)


def _never(noise: ReportedNoise) -> Iterator[str]:
    """Settings under which sigma is 0 throughout."""
    if noise.epoch_aware:
        yield "epoch-aware: the generator is asked for step 0 of 1, its own silent interval, so sigma stays 0"
    if noise.sigma_start == 0:
        yield "sigma_start is 0"
    if noise.num_stages is not None and noise.num_stages < _FEWEST_STAGES - 1:
        yield f"num_stages is {noise.num_stages}: the only interval is the silent one"
    multipliers = noise.layer_multipliers
    if isinstance(multipliers, dict) and multipliers and not any(multipliers.values()):
        yield "every layer multiplier is 0"


def _not_as_named(noise: ReportedNoise) -> Iterator[str]:
    """Settings under which there was noise, but not the noise that the report names."""
    if noise.sigma_end == 0 and noise.sigma_start:
        yield "sigma_end is 0: a geometric fade to 0 is its first value once and 0 ever after"
    if noise.layer_multipliers and "never reached" in (noise.effective_noise_reason or ""):
        yield "the layer multipliers did not act: uniform noise under another name"


def _unstated(reasons: tuple[str, ...], stated: tuple[str, ...]) -> Iterator[str]:
    """Reasons whose cause (their first word) the stated ones do not name already."""
    for reason in reasons:
        if not any(reason.split()[0].strip(":,").lower() in text.lower() for text in stated):
            yield reason
