"""At which precision, and on which problems, a policy is judged."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.errors import nearest, shown
from fp4rl.spec.formats import FORMATS
from fp4rl.spec.former_names import of_deployment
from fp4rl.spec.frozen import Spec, later_key
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import MODES
from fp4rl.spec.task import Task

MATMUL_NOISE = "matmul_noise="  # begins the name of a profile, the relative error follows
KNOWN_PROFILES = ("full", "deployment", *MODES, *FORMATS)
_OWN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # part of a file's name, and of `arm@profile`


def _wrong_profiles(key: str, names: Collection[str], own: Collection[str]) -> Iterator[str]:
    known = (*own, *KNOWN_PROFILES)
    for name in names:
        size = name.removeprefix(MATMUL_NOISE)
        if size != name and not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", size):
            yield f"{key}: {name}: write a number such as {MATMUL_NOISE}0.05"
        if size == name and name not in known:
            yield f"{key}: no profile is called {shown(name)}{nearest(name, (*known, f'{MATMUL_NOISE}0.05'))}"


def _wrong_deployment(name: str, profiles: Collection[str]) -> Iterator[str]:
    if name not in DEPLOYMENTS:
        yield f"deployment: no deployment is called {shown(name)}{nearest(name, DEPLOYMENTS)}"
        return
    for mode in (MODES[profile] for profile in profiles if profile in MODES):
        for point in ("input", "output"):
            if getattr(mode, point) and (why := DEPLOYMENTS[name].left_alone(point)):
                yield f"profiles: {mode.name}: {why}"


def _out_of_fragments(value: Any) -> Any:
    """Unwrap injections that stand below the key `injection`, as in a fragment that `fp4rl scan` wrote."""
    if not isinstance(value, dict):
        return value
    return {
        name: given["injection"] if isinstance(given, dict) and set(given) == {"injection"} else given
        for name, given in value.items()
    }


class Evaluation(Spec):
    """Step 0 and the last step are always evaluated, once per profile; noise is off.

    A profile is `full` (the model as it is, in its own dtype), `deployment` (the run's own injection), the name of a
    mode such as `w4a16` or of a format of the weights such as `mxfp8` (what a user would get by quantizing afterwards),
    `matmul_noise=0.05`, the deployment with that relative error in every matmul, or one of `injections`. `matmul_noise`
    and `formats` are a robustness sweep: such profiles for the last step alone.
    """

    count: PositiveInt = Field(default=500, description="problems of the held-out split")
    split: Literal["validation", "test"] = "test"
    profiles: tuple[str, ...] = Field(
        default=("full", "deployment"),
        min_length=1,
        description="precisions: full, deployment, a mode (w4a16), a format of the weights (mxfp8), matmul_noise=0.05, "
        "or a name in `injections`",
    )
    injections: Annotated[dict[str, Injection], BeforeValidator(_out_of_fragments)] = Field(
        default_factory=dict,
        description="your own injections by name, to be used as profiles; they act whole, whatever phases they name",
    )
    deployment: str = Field(
        default="ocp", description="whose rules the formats have in profiles that are named by a mode or a format"
    )
    test_freq: int = Field(default=0, ge=0, description="steps between evaluations during training; 0 for none")
    max_new_tokens: PositiveInt = Field(default=1024, description="tokens; training.max_response_length by default")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        default=None, description="texts that end an answer; by default GSM8K's is what its prompts begin with"
    )
    batch_size: PositiveInt = Field(default=256, description="problems answered at once")
    samples: PositiveInt = Field(default=1, description="1 is greedy; more are sampled at `temperature`")
    temperature: PositiveFloat = 1.0
    kl: bool = later_key(
        False, description="measure KL(unrounded || rounded) of the policy on its answers: two forwards of each more"
    )
    seed: NonNegativeInt = later_key(0, description="of sampled answers")
    matmul_noise: tuple[NonNegativeFloat, ...] = Field(default=(), description="sweep: relative errors of matmuls")
    formats: tuple[str, ...] = Field(default=(), description="sweep: formats of the weights")

    @model_validator(mode="before")
    @classmethod
    def _in_present_words(cls, value: Any) -> Any:
        return of_deployment(value) if isinstance(value, Mapping) else value

    def for_task(self, task: Task) -> "Evaluation":
        """Return a copy with the task's own `stop` texts where none are named."""
        return self if self.stop is not None else self.model_copy(update={"stop": task.stop})

    @property
    def sweep(self) -> tuple[str, ...]:
        """The profiles of the robustness sweep."""
        return (*(f"{MATMUL_NOISE}{scale:g}" for scale in self.matmul_noise), *self.formats)

    @property
    def all_profiles(self) -> tuple[str, ...]:
        """Every profile of the last step."""
        return (*self.profiles, *self.sweep)

    def _conflicts(self) -> Iterator[str]:
        for name, injection in self.injections.items():
            if name in KNOWN_PROFILES:
                yield f"injections: {name!r} is the name of a profile that there is already; take another"
            if not _OWN_NAME.fullmatch(name):
                yield f"injections: a name is letters, digits and ._+-; got {shown(name)}"
            if injection.is_nothing:
                yield f"injections: {name} names no format and no error; the profile full is that"
        yield from _wrong_deployment(self.deployment, self.all_profiles)
        yield from _wrong_profiles("formats", self.formats, own=())
        yield from _wrong_profiles("profiles", self.profiles, own=self.injections)
        if len(set(self.all_profiles)) != len(self.all_profiles):
            yield f"a profile is named twice in {[*self.all_profiles]}"
