"""Settings of the health monitor: thresholds of its checks, what an alarm does, and rules of the user's own."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fp4rl.spec.errors import InvalidValueError, nearest
from fp4rl.spec.former_names import THRESHOLDS, renamed
from fp4rl.spec.frozen import Spec

Policy = Literal["note", "stop", "rollback"]
State = Literal["not judged", "ok", "watch", "alarm"]
Operator = Literal["<", "<=", ">", ">=", "==", "!="]

# What the monitor looks for; each name is a key of `Health.policies` and has its entry in `rl/health/checks.py`.
CHECKS = (
    "not_a_number",
    "accuracy_collapse",
    "length_explosion",
    "entropy_collapse",
    "entropy_explosion",
    "reward_hacking",
    "gradient",
    "no_spread",
    "mismatch",
    "dead_rollouts",
)

_RULE = re.compile(
    r"(?P<action>note|watch|stop|rollback)\s+if\s+(?P<metric>\S+)\s*(?P<op><=|>=|==|!=|<|>)\s*"
    r"(?P<value>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    r"(?:\s+(?P<when>at|from)\s+step\s+(?P<step>\d+))?"
)


class Rule(Spec):
    """A rule of the user's own, such as `stop if accuracy/rollout < 0.1 at step 20`.

    `at` checks once, at the first observation from that step on; `from` checks at every observation from that step on;
    without either all are checked. A metric is a name in `metrics.jsonl` or in an imported log, or a signal of the
    monitor (`accuracy`).
    """

    action: Policy = "stop"
    metric: str
    op: Operator
    value: float
    when: Literal["at", "from"] = "from"
    step: NonNegativeInt = 0

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Parse a rule from one sentence. Raises InvalidValueError with an example."""
        match = _RULE.fullmatch(text.strip())
        if match is None:
            raise InvalidValueError(
                f"cannot read the rule {text!r}; write it like 'stop if accuracy/rollout < 0.1 at step 20' "
                "(note, stop or rollback; < <= > >= == !=; at or from step N, or neither)"
            )
        words = {name: word for name, word in match.groupdict().items() if word is not None}
        return cls.model_validate(words | ({"action": "note"} if match["action"] == "watch" else {}))

    def __str__(self) -> str:
        where = f" {self.when} step {self.step}" if self.step or self.when == "at" else ""
        return f"{self.action} if {self.metric} {self.op} {self.value:g}{where}"


class Thresholds(Spec):
    """Limits at which checks report `watch` or `alarm`. Ratios are to the run's own past, never absolute levels.

    `early`: the first steps, whose median is the level that the run began with. `persist`: steps in a row before an
    alarm (a single one is a spike). `noise`: standard deviations that a change must exceed, those of the run's own
    steps and at least the sampling error of the logged number of answers. `certain`: the same for a fall from the best
    level.
    """

    early: PositiveInt = 20
    persist: PositiveInt = 3
    noise: PositiveFloat = 2.5
    certain: PositiveFloat = Field(default=3.5, description="standard deviations that a fall must exceed")
    watched: PositiveInt = Field(default=20, description="steps that a watch lasts before it may become an alarm")
    worsened: PositiveFloat = Field(default=1.2, description="and how many times worse it must be by then")
    accuracy_drop: PositiveFloat = Field(default=0.5, description="share of the best accuracy whose loss is an alarm")
    accuracy_points: PositiveFloat = Field(default=0.05, description="accuracy that must be lost at least")
    accuracy_drop_watch: PositiveFloat = Field(
        default=0.3, description="share whose loss is watched, and makes another symptom an alarm"
    )
    below_validation: PositiveFloat = Field(default=0.25, description="rollout accuracy over validation accuracy")
    length_ratio: PositiveFloat = Field(default=1.5, description="length over its early median")
    truncated: PositiveFloat = Field(default=0.33, description="share cut off, where fewer were at the start")
    entropy_drop: PositiveFloat = Field(default=3.0, description="times below its own trend")
    entropy_left: PositiveFloat = Field(default=0.2, description="share of its early median that is left")
    entropy_rise: PositiveFloat = Field(default=1.5, description="times its lowest level, with accuracy falling")
    entropy_burst: PositiveFloat = Field(
        default=4.0, description="times its early median, while accuracy does not rise"
    )
    validation_drop: PositiveFloat = Field(default=0.05, description="validation accuracy lost while reward rose")
    reward_rise: PositiveFloat = Field(default=0.1, description="share by which reward rose meanwhile")
    gradient_ratio: PositiveFloat = Field(default=5.0, description="gradient norm over its recent median")
    gradient_burst: PositiveFloat = Field(default=50.0, description="the ratio that is an alarm whatever accuracy does")
    gradient_gone: PositiveFloat = Field(default=1e-3, description="gradient norm over its early median")
    no_spread: PositiveFloat = Field(default=0.95, description="share of groups whose answers all earn the same")
    spread_left: PositiveFloat = Field(default=0.25, description="groups with spread over their recent median")
    solved: PositiveFloat = Field(default=0.9, description="accuracy at which no spread means there is nothing left")
    mismatch_kl: PositiveFloat = Field(default=0.006, description="k3 estimate of KL(rollout || train), nats a token")
    mismatch_probability: PositiveFloat = Field(default=0.008, description="mean |probability difference| of a token")
    mismatch_phases: PositiveFloat = Field(default=5e-5, description="the KL that rounding alone makes, nats a token")
    mismatch_noise: PositiveFloat = Field(default=0.5, description="the same KL where all of it is described")
    described: PositiveFloat = Field(default=3.0, description="times the difference that is described; KL: its square")
    effective: PositiveFloat = Field(default=0.5, description="effective sample size that a rollout correction keeps")
    dead: PositiveFloat = Field(default=0.8, description="share of answers cut off")
    empty: PositiveFloat = Field(default=0.5, description="share of answers without a token")
    repetition: PositiveFloat = Field(default=0.5, description="share of repeated 4-grams")

    @model_validator(mode="before")
    @classmethod
    def _by_present_names(cls, value: Any) -> Any:
        return (
            renamed(value, THRESHOLDS)
            if isinstance(value, Mapping) and not {*THRESHOLDS.values()} & {*value}
            else value
        )


def _parsed(value: Any) -> Any:
    """Parse rules that are written as sentences; a single one stands for a list of one."""
    sentences = [value] if isinstance(value, str) else value
    if not isinstance(sentences, list | tuple):
        return value
    return tuple(Rule.parse(item) if isinstance(item, str) else item for item in sentences)


class Health(Spec):
    """The monitor of one run: what an alarm does (`policy`, or `policies` by check), rules, and thresholds.

    `note` writes the finding down; `stop` ends the run after the step; `rollback` goes back to the last checkpoint
    before the onset and multiplies the learning rate by `rollback_lr`, at most `max_rollbacks` times.
    """

    policy: Policy = "note"
    # After a NaN every number is worthless, so nothing is lost by stopping.
    policies: dict[str, Policy] = Field(default_factory=lambda: dict[str, Policy](not_a_number="stop"))
    rules: Annotated[tuple[Rule, ...], BeforeValidator(_parsed)] = ()
    thresholds: Thresholds = Thresholds()
    rollback_lr: PositiveFloat = Field(default=0.5, lt=1.0)
    max_rollbacks: PositiveInt = 2

    def _conflicts(self) -> Iterator[str]:
        for name in self.policies:
            if name not in CHECKS:
                yield f"policies: no check {name!r}{nearest(name, CHECKS)}"

    def policy_of(self, check: str) -> Policy:
        """Return what an alarm of `check` does."""
        return self.policies.get(check, self.policy)
