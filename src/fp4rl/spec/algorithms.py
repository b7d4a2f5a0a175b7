"""What each algorithm's paper does where a recipe does not say: the one table of published defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Algorithm = Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"]
LossAggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


@dataclass(frozen=True)
class Published:
    """One algorithm. Clip ratios are distances from 1; `filters` is dynamic sampling, `punishes_overlong` the soft
    punishment of answers near the cap, `kl_loss_coef` the weight of the KL to the reference."""

    source: str
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    loss_agg_mode: LossAggregation = "token-mean"
    norm_adv_by_std: bool = True
    filters: bool = False
    punishes_overlong: bool = False
    kl_loss_coef: float = 0.0


PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        # token mean, clip-higher, dynamic sampling, soft overlong punishment, no KL
        "dapo": Published("arXiv 2503.14476", clip_ratio_high=0.28, filters=True, punishes_overlong=True),
        "grpo": Published("arXiv 2402.03300", loss_agg_mode="seq-mean-token-mean", kl_loss_coef=0.04),
        "dr_grpo": Published("arXiv 2503.20783", loss_agg_mode="seq-mean-token-sum-norm", norm_adv_by_std=False),
        # A geometric mean over an answer moves far less than one token does, hence the small bounds.
        "gspo": Published(
            "arXiv 2507.18071", clip_ratio_low=3e-4, clip_ratio_high=4e-4, loss_agg_mode="seq-mean-token-mean"
        ),
        # With the upper bound of arXiv 2510.13786 (ratio <= 5) and no lower one, 1 - 1 = 0; dynamic sampling and the
        # punishment are taken over from DAPO.
        "cispo": Published(
            "arXiv 2506.13585", clip_ratio_low=1.0, clip_ratio_high=4.0, filters=True, punishes_overlong=True
        ),
    }
)
