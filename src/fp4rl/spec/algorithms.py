"""The policy losses that a recipe can name, each with the defaults of its paper.

An algorithm is one entry of `ALGORITHMS`; `rl/losses.py` holds the formulas that `ratio_level` and `clipping` name, and
refuses to be imported where one is missing. An aggregation is one entry of `LOSS_AGGREGATIONS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class Aggregation:
    """How per-token losses become one number: summed over each answer, those sums over all answers, and divided.

    `mean_of_answer`: each answer's sum is divided by its length. `over`: what the total is divided by, tokens or
    answers of the whole optimizer step. `over_longest`: and by `max_response_length`, a constant, so that the scale of
    the gradient does not follow the lengths of a batch.
    """

    over: Literal["tokens", "answers"]
    mean_of_answer: bool = False
    over_longest: bool = False


LOSS_AGGREGATIONS: Mapping[str, Aggregation] = MappingProxyType(
    {
        "token-mean": Aggregation(over="tokens"),  # DAPO: every token of the step weighs the same
        "seq-mean-token-mean": Aggregation(over="answers", mean_of_answer=True),  # GRPO: every answer weighs the same
        "seq-mean-token-sum": Aggregation(over="answers"),
        "seq-mean-token-sum-norm": Aggregation(over="answers", over_longest=True),  # Dr. GRPO
    }
)


@dataclass(frozen=True)
class Algorithm:
    """One policy loss, and the defaults of its paper for what a recipe does not say.

    `ratio_level`: whether probability ratios are of tokens or of whole answers. `clipping`: the surrogate. Clip ratios
    are distances from 1.
    `filters`: dynamic sampling. `punishes_overlong`: the soft punishment of answers near the limit. `kl_loss_coef`: the
    weight of the KL to the reference.
    """

    source: str
    ratio_level: str = "token"
    clipping: str = "ppo"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    loss_agg_mode: str = "token-mean"
    norm_adv_by_std: bool = True
    filters: bool = False
    punishes_overlong: bool = False
    kl_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.loss_agg_mode not in LOSS_AGGREGATIONS:
            raise ValueError(f"{self.source}: no loss_agg_mode {self.loss_agg_mode!r} in LOSS_AGGREGATIONS")


ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        # token mean, clip-higher, dynamic sampling, soft overlong punishment, no KL
        "dapo": Algorithm("arXiv 2503.14476", clip_ratio_high=0.28, filters=True, punishes_overlong=True),
        "grpo": Algorithm("arXiv 2402.03300", loss_agg_mode="seq-mean-token-mean", kl_loss_coef=0.04),
        "dr_grpo": Algorithm("arXiv 2503.20783", loss_agg_mode="seq-mean-token-sum-norm", norm_adv_by_std=False),
        # A geometric mean over an answer moves far less than one token does, hence the small bounds.
        "gspo": Algorithm(
            "arXiv 2507.18071",
            ratio_level="sequence",
            clip_ratio_low=3e-4,
            clip_ratio_high=4e-4,
            loss_agg_mode="seq-mean-token-mean",
        ),
        # With the upper bound of arXiv 2510.13786 (ratio <= 5) and no lower one, 1 - 1 = 0; dynamic sampling and the
        # punishment are taken over from DAPO.
        "cispo": Algorithm(
            "arXiv 2506.13585",
            clipping="cispo",
            clip_ratio_low=1.0,
            clip_ratio_high=4.0,
            filters=True,
            punishes_overlong=True,
        ),
    }
)

# Each name has its function in `rl/rollout.py` and `rl/losses.py`, which refuse to be imported otherwise.
ADV_ESTIMATORS = ("grpo", "rloo", "reinforce_plus_plus_baseline")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "low_var_kl")
KL_LOSS_TYPES = (*KL_ESTIMATORS, "k1+", "k3+", "abs+", "low_var_kl+")

if TYPE_CHECKING:  # a type checker cannot read a table
    AlgorithmName = str
    LossAggregation = str
    AdvantageEstimator = str
    KlLossType = str
else:
    AlgorithmName = Literal[tuple(ALGORITHMS)]
    LossAggregation = Literal[tuple(LOSS_AGGREGATIONS)]
    AdvantageEstimator = Literal[ADV_ESTIMATORS]
    KlLossType = Literal[KL_LOSS_TYPES]
