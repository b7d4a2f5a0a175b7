"""How a policy is trained: the settings of GRPO and its relatives under the names that verl and TRL use."""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from fp4rl.spec.algorithms import ALGORITHMS, AdvantageEstimator, Algorithm, AlgorithmName, KlLossType, LossAggregation
from fp4rl.spec.clipping import LearnedClipping
from fp4rl.spec.distillation import Distillation
from fp4rl.spec.frozen import Spec, later_key
from fp4rl.spec.oscillation import Oscillation
from fp4rl.spec.words import counted


class OverlongBuffer(Spec):
    """DAPO's soft overlong punishment: linear over the last `len` tokens before the cap (arXiv 2503.14476, eq. 13)."""

    enable: bool | None = Field(default=None, description="the algorithm's own by default: on in dapo and cispo")
    len: PositiveInt | None = Field(default=None, description="tokens; a fifth of max_response_length by default")
    penalty_factor: PositiveFloat = 1.0


class FilterGroups(Spec):
    """DAPO's dynamic sampling: groups whose metric has no spread are dropped and replaced by fresh ones.

    `metric`: `score` is what `training.reward` gives, `reward` the same less the overlong punishment, `acc` the task's
    own strict score, whatever the reward is.
    """

    enable: bool | None = Field(default=None, description="the algorithm's own by default: on in dapo and cispo")
    metric: Literal["score", "acc", "reward"] = Field(
        default="score", description="score: what training.reward gives; reward: less the overlong punishment; acc"
    )
    max_num_gen_batches: PositiveInt = 3


OptimizerName = Literal[
    "adamw",
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
]
# The package that an optimizer comes from, where it is not torch itself.
OPTIMIZERS_OF: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"), "bitsandbytes"),
        **dict.fromkeys(("adamw_torch_8bit", "adamw_torch_4bit"), "torchao"),
    }
)
_Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class WeightedReward(Spec):
    """One of several rewards. `pattern` is that of `regex`: its first group is compared with the gold answer; a pattern
    without a group gives its point to any answer that it is found in."""

    name: str = Field(description="what training.reward takes, or regex")
    weight: float = Field(default=1.0, description="what its points are multiplied by; below 0 for a penalty")
    pattern: str | None = Field(default=None, description="of regex, such as '<answer>(.*?)</answer>'")

    def _conflicts(self) -> Iterator[str]:
        if (self.name == "regex") != (self.pattern is not None):
            yield "`pattern` belongs to the reward regex, which needs one"
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            yield f"pattern {self.pattern!r} is no regular expression ({error})"
        if self.weight == 0:
            yield f"weight 0 leaves {self.name} out; drop it"


class RolloutCorrection(Spec):
    """Importance weights for the difference between the policy that sampled and the one that is trained."""

    rollout_is: Literal["none", "token", "sequence"] = "none"
    mode: Literal["truncate", "mask"] = "truncate"
    threshold: float = Field(default=2.0, gt=1.0, description="1 or less would cut ratios of 1")


class Ema(Spec):
    """The exponential moving average of the FP32 masters over optimizer updates. It is what is then judged and saved;
    rollouts are by the live weights."""

    decay: float = Field(
        gt=0.0, lt=1.0, description="what is kept of the average at each update; .98 averages about 50"
    )
    rounds: bool = later_key(
        False, description="whether rollouts and training take, of a weight's two levels, the one nearer its average"
    )


class Training(Spec):
    """One step is one batch of rollouts and the `train_batch_size / mini_batch_size` updates made from it."""

    algorithm: AlgorithmName = Field(default="dapo", description="the loss, and the defaults of its paper")
    steps: PositiveInt = Field(default=30, description="batches of rollouts")
    epochs: PositiveInt | None = later_key(None, description="in place of steps: how often every problem is drawn")
    train_batch_size: PositiveInt = Field(default=16, description="prompts a step")
    rollout_n: int = Field(default=8, ge=2, description="answers a prompt")
    mini_batch_size: PositiveInt = Field(default=8, description="prompts an update")
    micro_batch_size: PositiveInt | None = Field(default=None, description="answers a backward pass; whole by default")
    lr: PositiveFloat = Field(
        default=1e-6,
        description="learning rate of AdamW; by default 1e-5 with LoRA, 4e-4 for the embedded model (m: 1e-4, l: 5e-5)",
    )
    lr_scheduler: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    lr_warmup_steps: int = Field(default=0, ge=0, description="steps in which lr rises")
    weight_decay: float = Field(default=0.0, ge=0.0)
    optimizer: OptimizerName = later_key(
        "adamw",
        description="as transformers names it; of 8 bits: adamw_8bit (bitsandbytes), adamw_torch_8bit (torchao)",
    )
    betas: tuple[_Decay, _Decay] = later_key((0.9, 0.999), description="of AdamW: how slowly its two means move")
    grad_clip: PositiveFloat = Field(default=1.0, description="greatest norm of the gradient")
    clip_ratio_low: float | None = Field(default=None, gt=0.0, le=1.0, description="the algorithm's own by default")
    clip_ratio_high: PositiveFloat | None = Field(default=None, description="the algorithm's own (DAPO: 0.28)")
    clip_ratio_c: float | None = later_key(
        None, gt=1.0, description="dual clip: greatest ratio of tokens with a negative advantage; none by default"
    )
    loss_agg_mode: LossAggregation | None = Field(default=None, description="the algorithm's own by default")
    adv_estimator: AdvantageEstimator = Field(default="grpo", description="how rewards of a group become advantages")
    norm_adv_by_std: bool | None = Field(default=None, description="the algorithm's own by default")
    reward: str = Field(
        default="accuracy",
        description="accuracy, math_verify, exact, choice; or a function: file.py:name beside the suite, a.module.name",
    )
    rewards: tuple[WeightedReward, ...] = later_key((), description="several rewards instead, which are added up")
    kl_loss_coef: float | None = Field(
        default=None,
        ge=0.0,
        description="weight of the KL to the reference; the algorithm's own by default (grpo: 0.04)",
    )
    kl_loss_type: KlLossType = Field(
        default="low_var_kl", description="the estimator; low_var_kl is k3, and + takes the gradient of k2"
    )
    reference_precision: Literal["full", "deployment"] = Field(
        default="full", description="whether the reference is rounded like the policy"
    )
    entropy_coeff: float = Field(default=0.0, ge=0.0, description="weight of an entropy bonus")
    temperature: PositiveFloat = Field(default=1.0, description="of the rollouts")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="of the rollouts")
    max_prompt_length: PositiveInt = Field(default=256, description="tokens; a run with a longer prompt is refused")
    filter_overlong_prompts: bool = later_key(
        False, description="whether problems with longer prompts are left out, and counted, instead"
    )
    max_response_length: PositiveInt = Field(
        default=1024, description="tokens an answer may have; by default 48 for the embedded model (m, l: 52)"
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = later_key(
        (), description="texts that end an answer of a rollout, besides the end token; evaluation.stop has its own"
    )
    mask_truncated: bool = Field(
        default=False, description="whether answers that were cut off are left out of the loss"
    )
    overlong_buffer: OverlongBuffer = OverlongBuffer()
    filter_groups: FilterGroups = FilterGroups()
    rollout_correction: RolloutCorrection = RolloutCorrection()
    distillation: Distillation | None = None
    ema: Ema | None = later_key(None)
    oscillation: Oscillation | None = later_key(None)
    learned_clipping: LearnedClipping | None = later_key(None)
    deployed: Literal["last", "best"] = later_key(
        "last",
        description="whose policy is saved: that of the last step, or of the one among each evaluation.test_freq steps "
        "that is best on the validation split",
    )
    gradient_checkpointing: bool = False
    routing_replay: bool = later_key(
        False, description="mixtures: whether training takes the experts that the rollout chose for each token"
    )
    save_freq: int = Field(default=0, ge=0, description="steps between checkpoints that stay after the run; 0: none do")
    save_total_limit: PositiveInt = later_key(2, description="how many of them stay, the newest; more for rollbacks")

    @field_validator("algorithm", mode="before")
    @classmethod
    def _no_critic(cls, value: object) -> object:
        if value == "ppo":
            raise ValueError(
                "ppo is left out: it needs a critic of the policy's size, whose work the mean of the group does in "
                "dapo and grpo"
            )
        return value

    @property
    def published(self) -> Algorithm:
        """The algorithm with the defaults of its paper."""
        return ALGORITHMS[self.algorithm]

    @property
    def all_rewards(self) -> tuple[WeightedReward, ...]:
        """The rewards that are added up: `rewards`, or `reward` alone."""
        return self.rewards or (WeightedReward(name=self.reward),)

    @property
    def filters(self) -> bool:
        """Whether groups without spread are replaced."""
        return self.published.filters if self.filter_groups.enable is None else self.filter_groups.enable

    @property
    def overlong(self) -> int | None:
        """Tokens before the cap in which an answer is punished; None for no punishment."""
        buffer = self.overlong_buffer
        if not (self.published.punishes_overlong if buffer.enable is None else buffer.enable):
            return None
        return buffer.len or max(1, self.max_response_length // 5)  # DAPO's own: 4,096 of 20,480

    @property
    def kl(self) -> float:
        """The weight of the KL to the reference. Distillation alone has no loss that it could be added to."""
        if self.distillation is not None and self.distillation.alone:
            return self.kl_loss_coef or 0.0
        return self.published.kl_loss_coef if self.kl_loss_coef is None else self.kl_loss_coef

    def effective(self) -> dict[str, Any]:
        """Return the effective recipe, with the algorithm's defaults filled in, under the keys that would set it."""
        own, filters, longest = self.published, self.filter_groups, self.max_response_length
        return {
            "lr": self.lr,
            "clip_ratio_low": self.clip_ratio_low or own.clip_ratio_low,
            "clip_ratio_high": self.clip_ratio_high or own.clip_ratio_high,
            **({} if self.clip_ratio_c is None else {"clip_ratio_c": self.clip_ratio_c}),
            "loss_agg_mode": self.loss_agg_mode or own.loss_agg_mode,
            "norm_adv_by_std": own.norm_adv_by_std if self.norm_adv_by_std is None else self.norm_adv_by_std,
            "kl_loss_coef": self.kl,
            "filter_groups": f"{filters.metric}, {filters.max_num_gen_batches} generations" if self.filters else "off",
            "overlong_buffer": "off" if self.overlong is None else f"the last {self.overlong} of {longest} tokens",
        }

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates made from one batch of rollouts."""
        return self.train_batch_size // self.mini_batch_size

    def _conflicts(self) -> Iterator[str]:
        yield from self._wrong_rewards()
        if self.clip_ratio_c is not None and self.published.clipping != "ppo":
            yield f"clip_ratio_c: {self.algorithm} has no ratio that it could bound; it is of ppo's clipping"
        if self.train_batch_size % self.mini_batch_size:
            yield (
                f"train_batch_size {self.train_batch_size} is not a multiple of mini_batch_size {self.mini_batch_size}"
            )
        answers = self.mini_batch_size * self.rollout_n
        if self.micro_batch_size and answers % self.micro_batch_size:
            yield (
                f"micro_batch_size {self.micro_batch_size} does not divide the {answers} answers of one update "
                f"(mini_batch_size {self.mini_batch_size} x rollout_n {self.rollout_n})"
            )
        if self.overlong is not None and self.overlong >= self.max_response_length:
            yield (
                f"overlong_buffer.len {self.overlong} must be below max_response_length "
                f"{self.max_response_length}: every answer would be punished"
            )

    def _wrong_rewards(self) -> Iterator[str]:
        names = [reward.name for reward in self.rewards]
        if names and self.reward != "accuracy":
            yield f"reward {self.reward} and rewards are both named: add it to rewards, and leave reward at accuracy"
        if len(set(names)) != len(names):
            yield f"rewards: one is named twice in {names}"
        if self.reward == "regex":
            yield "reward regex needs its pattern: write rewards: [{name: regex, pattern: '#### (.*)'}]"

    def not_shared(self, processes: int) -> Iterator[str]:
        """Yield what keeps several processes from running the recipe like a single one, each on an even share."""
        answers = self.mini_batch_size * self.rollout_n
        share, micro = answers // processes, self.micro_batch_size
        cannot = f"{processes} processes cannot share"
        if self.train_batch_size % processes:
            yield f"{cannot} train_batch_size {self.train_batch_size} evenly; take a multiple of {processes}"
        if answers % processes:
            yield (
                f"{cannot} the {answers} answers of one update (mini_batch_size {self.mini_batch_size} x rollout_n "
                f"{self.rollout_n}) evenly; take a multiple of {processes}"
            )
        elif micro and share % micro:
            yield f"micro_batch_size {micro} does not divide the {share} answers of an update that each process has"
        if processes > 1 and self.adv_estimator == "reinforce_plus_plus_baseline":
            yield (
                "adv_estimator reinforce_plus_plus_baseline divides by the spread of the whole batch, of which each of "
                f"{processes} processes has a share: take grpo or rloo"
            )

    def warnings(self) -> Iterator[str]:
        """Yield a line for everything that is allowed but rarely ends well; `spec.idle` has what cannot act."""
        if self.lr_warmup_steps > 0.2 * self.steps:
            yield f"lr_warmup_steps {self.lr_warmup_steps} is more than a fifth of {counted(self.steps, 'step')}"
        if self.save_freq > self.steps:
            yield (
                f"save_freq {self.save_freq} is more than {counted(self.steps, 'step')}: there will be no checkpoint "
                "but those against interruptions, which go when the run is done"
            )
