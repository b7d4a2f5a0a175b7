"""A file of reported experiments: a record for each, under ids of the file's own."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp4rl.spec.errors import InvalidValueError, NotFoundError


class _Reported(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ReportedNoise(_Reported):
    """The noise (AQN) that a report names. `effective_noise`: as its code or log shows; None if that was not read."""

    enabled: bool = False
    sigma_start: float | None = None
    sigma_end: float | None = None
    epoch_aware: bool = False
    num_stages: int | None = None
    layer_multipliers: dict[str, float] | str | None = None
    effective_noise: bool | None = None
    effective_noise_reason: str | None = None


class Record(_Reported):
    """One reported experiment. Accuracies are in points; `curve` holds (step, accuracy)."""

    id: str
    model: str | None = None
    algorithm: str | None = None
    format: str | None = None
    quant_mode: str | None = None
    injection_point: str | None = None
    hw_noise: str | None = None
    aqn: ReportedNoise = ReportedNoise()
    lora: dict[str, Any] | None = None
    epochs: float | None = None
    steps: int | None = None
    batch: dict[str, Any] | None = None
    final_accuracy: float | None = None
    final_eval_step: int | None = None
    curve: tuple[tuple[int, float], ...] | None = None
    status: str | None = None
    confounds: tuple[str, ...] = ()

    @property
    def counts_as_result(self) -> bool:
        """Whether the report claims the number as a result: not failed, hung, invalid or planned."""
        stands = (self.status or "completed").split()[0].strip(",;(") in ("completed", "collapsed", "paused")
        return self.final_accuracy is not None and stands and "invalid" not in (self.status or "")

    @property
    def final_step(self) -> int | None:
        """The step of the final number: as recorded, or where the curve ends in exactly that number."""
        if self.final_eval_step is not None or not self.curve or self.final_accuracy is None:
            return self.final_eval_step
        step, last = self.curve[-1]
        return step if abs(last - self.final_accuracy) < 0.005 else None

    @property
    def logged_final(self) -> float | None:
        """The curve's value at the final step, or at the end of the run; tables are typed by hand and may differ."""
        return dict(self.curve or ()).get(self.logged_step or -1, self.final_accuracy)

    @property
    def logged_step(self) -> int | None:
        """The step of `logged_final`; None where neither the report nor its curve tells."""
        steps = {step for step, _ in self.curve or ()}
        return self.final_step or (self.steps if self.steps in steps else None)

    @property
    def hardware_error(self) -> str:
        """The hardware error under one name: 'matmul 5% fwd+bwd' is 'matmul 5%', 'ALL_OPS 5% (...)' is 'ALL_OPS 5%'."""
        return re.sub(r"\s*\(.*\)|\s*fwd\+bwd", "", self.hw_noise or "")

    def solved(self, problems: int) -> int:
        """Return the whole number of problems behind the reported percentage."""
        return round((self.final_accuracy or 0.0) * problems / 100)


class Reports(_Reported):
    """The file: `records`, and `gsm8k_test_n`, the number of problems of every accuracy."""

    gsm8k_test_n: int = Field(gt=0)
    records: tuple[Record, ...] = Field(min_length=1)


def read_reports(path: Path) -> Reports:
    """Read the JSON file. Raises `NotFoundError` without it, `InvalidValueError` for another layout or an id twice."""
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file; name a JSON file with 'records' and 'gsm8k_test_n'")
    try:
        reports = Reports.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidValueError(f"{path}: not JSON in UTF-8 ({error})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    twice = [name for name, count in Counter(record.id for record in reports.records).items() if count > 1]
    if twice:
        raise InvalidValueError(f"{path}: records are told apart by id, and these stand twice: {', '.join(twice)}")
    return reports
