"""Per-token estimates of KL(policy || reference) from the log-probs of sampled tokens: verl's `kl_loss_type`.

With x = log p_ref - log p_policy at a token drawn from the policy (J. Schulman, "Approximating KL divergence", 2020):

    k1 = -x            unbiased, noisy, can be negative; as a *loss* its gradient is zero on average
    k2 = x^2 / 2       biased, but its gradient is that of the KL
    k3 = e^x - x - 1   unbiased, never negative; verl and DeepSeek call it low_var_kl
    abs = |x|

A trailing `+` (`k3+`) keeps the value and takes the gradient of k2.
"""

from torch import Tensor

from fp4rl.spec.errors import NotFoundError, nearest

KL_LOSS_TYPES = ("k1", "k2", "k3", "abs", "kl", "mse", "low_var_kl", "k1+", "k3+", "abs+", "kl+", "low_var_kl+")

# exp(20) = 4.9e8: beyond it a ratio carries no information, and exp(89) is infinite in float32.
SAFE_LOG_RATIO = 20.0
# verl's cap on one token's k3.
K3_CAP = 10.0


def kl_per_token(logps: Tensor, ref_logps: Tensor, kl_loss_type: str = "low_var_kl") -> Tensor:
    """Estimate of KL(policy || reference) at each token, in nats; same shape as `logps`. Raises NotFoundError."""
    value = _estimate(logps, ref_logps, kl_loss_type.removesuffix("+"))
    if not kl_loss_type.endswith("+"):
        return value
    k2 = 0.5 * (logps - ref_logps).square()
    return k2 - k2.detach() + value.detach()


def _estimate(logps: Tensor, ref_logps: Tensor, kind: str) -> Tensor:
    x = ref_logps - logps
    match kind:
        case "k1" | "kl":
            return -x
        case "abs":
            return x.abs()
        case "k2" | "mse":
            return 0.5 * x.square()
        case "k3" | "low_var_kl":
            x = x.clamp(-SAFE_LOG_RATIO, SAFE_LOG_RATIO)
            return (x.exp() - x - 1).clamp(max=K3_CAP)
        case _:
            raise NotFoundError(f"no kl_loss_type {kind!r}{nearest(kind, KL_LOSS_TYPES)}")
