"""The kinds of lines in evidence.jsonl, as types: one for each thing that acted in a run, evaluations among them.

Writers of evidence construct these, so that an unknown key, or a value of another type, is an error there. Files
are read by `fp4rl.spec.records`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from fp4rl.spec.clipping import Clipped
from fp4rl.spec.frozen import Record
from fp4rl.spec.health import Policy, State
from fp4rl.spec.points import Phase
from fp4rl.spec.task import SCORES
from fp4rl.spec.transforms import Transformed

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Profile(Record):
    """Everything that a score depends on besides the weights; stored with every score. None: not recorded."""

    name: str
    precision: str | None = None
    sites_digest: str | None = None
    noise: str | None = None
    scorer: str | None = None
    max_new_tokens: int | None = None
    sampling: str | None = None
    items_digest: str | None = None
    deployment: str | None = None  # that it imitates


class Evaluation(Record):
    """Shares over all answers of one evaluation, and the profile they were measured under.

    `n` counts answers, `problems` the problems. With several answers to a problem `strict` is their mean. `of_samples`
    holds `mean@k`, `pass@k`, `maj@k` and any further score of `spec.task.Score`; on disk these stand beside the other
    keys. Two evaluations have the same `answers_digest` where every answer is the same.
    `kl`: KL(unrounded || rounded) of the policy in nats, `same_top`: the share of tokens whose likeliest next token is
    the same; means over `kl_tokens`, the tokens of these answers. None: not measured.
    """

    kind: Literal["evaluation"] = Field("evaluation", exclude=True)
    step: int
    last: bool = False
    profile: Profile = Profile(name="unnamed")
    n: int | None = None
    problems: int | None = None
    strict: Share
    flexible: Share | None = None
    formatted: Share | None = None
    truncated: Share | None = None
    mean_length: float | None = None
    answers_digest: str | None = None
    kl: float | None = None
    same_top: Share | None = None
    kl_tokens: int | None = None
    of_samples: Mapping[str, Share] = Field(default_factory=dict)

    def score(self, name: str) -> float | None:
        """Return a score by its name: one of the fields above, or an entry of `of_samples`."""
        value: float | None = getattr(self, name) if name in type(self).model_fields else self.of_samples.get(name)
        return value

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        others = [key for key in content if key not in cls.model_fields]
        beside = {k: content[k] for k in others if k in SCORES or str(k).startswith(("mean@", "pass@", "maj@"))}
        rest = {key: value for key, value in content.items() if key not in beside}
        return rest | {"of_samples": {**rest.get("of_samples", {}), **beside}} if beside else rest

    @model_serializer(mode="wrap")
    def _spread_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        beside: dict[str, Any] = content.pop("of_samples", {})
        return content | beside


class ActivePoints(Record):
    """What the description makes act in a phase: points and hardware errors, each with the number of its sites."""

    kind: Literal["acting"] = Field("acting", exclude=True)
    phase: Phase
    points: Mapping[str, int]
    profile: str | None = None
    step: int | None = None


class Rounded(Record):
    """At `sites` sites the operands of a phase's matmuls were found equal to their rounded originals."""

    kind: Literal["rounded"] = Field("rounded", exclude=True)
    phase: Phase
    sites: int
    profile: str | None = None
    step: int | None = None


class Injected(Record):
    """What one point of one site did in one phase; under a `profile` where that was an evaluation. `looks` counts calls
    whose tensors were compared before and after, `missed` those that rounded nothing although rounding would change
    the tensor; both are None in files of versions that did not count. `stage`: of a precision that changes, where the
    injection's own format did not act alone yet."""

    kind: Literal["injection"] = Field("injection", exclude=True)
    phase: Phase
    site: str
    point: str
    format: str | None = None
    calls: int
    elements: int
    share_changed: float | None = None
    relative_error: float | None = None
    looks: int | None = None
    missed: int | None = None
    stage: Literal["before", "blend"] | None = None
    profile: str | None = None
    step: int | None = None


class MasterCheck(Record):
    """Whether the master weights are bit for bit what they were before a phase, and their digest before it."""

    kind: Literal["master"] = Field("master", exclude=True)
    phase: Phase | None = None
    step: int | None = None
    profile: str | None = None
    unchanged: bool = Field(alias="unharmed")
    digest: str | None = None


class LayerNoise(Record):
    """The noise on one layer's weights (None: outside the layers); sizes are root mean squares over its weights.

    `drawn` is the noise as sampled, `realised` what the weights' dtype kept of it, `swallowed` counts the elements
    that it left unchanged.
    """

    layer: int | None
    sigma: float
    drawn: float
    realised: float
    share_changed: float
    swallowed: int
    elements: int


class RolloutNoise(Record):
    """The noise of one rollout: the scheduled sigma, and the noise measured in each layer."""

    kind: Literal["noise"] = Field("noise", exclude=True)
    step: int
    sigma: float
    weights: int
    elements: int
    share_changed: float
    swallowed: int
    layers: tuple[LayerNoise, ...]


class NoiseStages(Record):
    """The values of sigma that ran, each with its number of rollouts, and those of the schedule that never ran."""

    kind: Literal["noise_stages"] = Field("noise_stages", exclude=True)
    ran: tuple[tuple[float, int], ...]
    missed: tuple[float, ...]


class Oscillated(Record):
    """One layer's codes in a run: the mean share that an update changed, those oscillating and frozen at its end."""

    kind: Literal["oscillation"] = Field("oscillation", exclude=True)
    layer: int | None
    weights: int
    code_flips: Share
    oscillating: Share
    frozen: Share | None = None


class LiveCheck(Record):
    """The largest difference between the logits of the live policy and those of its saved copy.

    `compared`: digests of the weights instead, of a policy that another engine trained; where they are equal, it is 0.
    """

    kind: Literal["live_equals_fresh"] = Field("live_equals_fresh", exclude=True)
    max_difference: float
    compared: Literal["logits", "weights"] = "logits"


class WeightsMoved(Record):
    """How many of the trainable weights training changed."""

    kind: Literal["moved"] = Field("moved", exclude=True)
    trainable: int
    changed: int
    share: float


class HealthFinding(Record):
    """A check's state from `step` on; `since` is the first step of what led to it, `policy` what an alarm does."""

    kind: Literal["health"] = Field("health", exclude=True)
    check: str
    state: State
    step: int
    since: int
    evidence: str
    policy: Policy


class RolledBack(Record):
    """The monitor took a run back from `step` to the checkpoint after step `to`, at a lower learning rate."""

    kind: Literal["rollback"] = Field("rollback", exclude=True)
    step: int
    to: int
    lr: float
    why: str


class WeightsServed(Record):
    """A server answered with `weight_version` alone, `tensors` of which were sent to it for this call.

    `compared`: how many of them were compared with what it multiplies by, value by value; 0 where it was not its turn.
    """

    kind: Literal["weights_served"] = Field("weights_served", exclude=True)
    weight_version: str
    tensors: int
    compared: int
    profile: str | None = None
    step: int | None = None


class Reused(Record):
    """The answers of the start under a profile are those of an entry that a run before had made."""

    kind: Literal["reused"] = Field("reused", exclude=True)
    profile: str
    entry: str


class CheckpointKept(Record):
    """A checkpoint was written after `step`; a run that resumes from it drops the lines below this one."""

    kind: Literal["checkpoint"] = Field("checkpoint", exclude=True)
    step: int


class Failed(Record):
    """Why the run came to no result; forgotten when it is tried again."""

    kind: Literal["failed"] = Field("failed", exclude=True)
    why: str


class Warned(Record):
    """A warning that was shown to whoever started the run."""

    kind: Literal["warning"] = Field("warning", exclude=True)
    line: str


Evidence = (
    ActivePoints
    | CheckpointKept
    | Clipped
    | Evaluation
    | Failed
    | HealthFinding
    | Injected
    | LiveCheck
    | MasterCheck
    | NoiseStages
    | Oscillated
    | Reused
    | RolledBack
    | RolloutNoise
    | Rounded
    | Transformed
    | Warned
    | WeightsMoved
    | WeightsServed
)
KINDS: Mapping[str, type[Record]] = {kind.model_fields["kind"].default: kind for kind in get_args(Evidence)}
