"""Per-token estimates of KL(policy || reference) from the log-probs of sampled tokens: verl's `kl_loss_type`.

With x = log p_ref - log p_policy at a token drawn from the policy (J. Schulman, "Approximating KL divergence", 2020):

    k1 = -x            unbiased, noisy, can be negative; as a *loss* its gradient is zero on average
    k2 = x^2 / 2       biased, but its gradient is that of the KL
    k3 = e^x - x - 1   unbiased, never negative; verl and DeepSeek call it low_var_kl
    abs = |x|

A trailing `+` (`k3+`) keeps the value and takes the gradient of k2.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from fp4rl.spec.algorithms import KL_ESTIMATORS
from fp4rl.spec.errors import NotFoundError, nearest, require_names

# exp(20) = 4.9e8: beyond it a ratio carries no information, and exp(89) is infinite in float32.
SAFE_LOG_RATIO = 20.0
# verl's cap on one token's k3.
K3_CAP = 10.0


def _k3(x: Tensor) -> Tensor:
    x = x.clamp(-SAFE_LOG_RATIO, SAFE_LOG_RATIO)
    return (x.exp() - x - 1).clamp(max=K3_CAP)


_ESTIMATES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "k1": lambda x: -x,
        "k2": lambda x: 0.5 * x.square(),
        "k3": _k3,
        "abs": lambda x: x.abs(),
        "low_var_kl": _k3,
    }
)
require_names("kl_loss_type", _ESTIMATES, KL_ESTIMATORS)


def kl_per_token(logps: Tensor, ref_logps: Tensor, kl_loss_type: str = "low_var_kl") -> Tensor:
    """Estimate KL(policy || reference) at each token, in nats; same shape as `logps`. Raises NotFoundError."""
    kind = kl_loss_type.removesuffix("+")
    if kind not in _ESTIMATES:
        raise NotFoundError(f"no kl_loss_type {kl_loss_type!r}{nearest(kind, KL_ESTIMATORS)}")
    value = _ESTIMATES[kind](ref_logps - logps)
    if kind == kl_loss_type:
        return value
    k2 = 0.5 * (logps - ref_logps).square()
    return k2 - k2.detach() + value.detach()
