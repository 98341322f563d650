"""How far the policy has moved from its reference, per token, and the coefficient that holds it back."""

import math
from dataclasses import dataclass, replace
from typing import Literal, assert_never

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """An estimate in nats of KL(policy || reference) from each sampled token; the shape of the inputs.

    With d = log p(x) - log q(x), x drawn from the policy p, reference q:
    k1 = d (unbiased, may be negative);  k2 = d^2 / 2 (biased, small variance);
    k3 = exp(-d) - 1 + d (unbiased, never negative).
    Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).

    logprobs, ref_logprobs: (B, T) of the sampled tokens, at the same temperature.
    """
    d = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return d
        case "k2":
            return d.square() / 2
        case "k3":
            return torch.expm1(-d) + d  # expm1: exp(-d) - 1 would round to 0 where the two hardly differ
        case _:
            assert_never(estimator)


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """The KL coefficient, and the controller that moves it towards a target; without a target it stays as it is.

    e = clip(KL / target - 1, -0.2, 0.2);  coef' = coef * (1 + e * n / horizon).
    Ziegler et al. 2019 (arXiv:1909.08593), section 2.2; their gain 0.1 a step is n / horizon here.

    Example: `AdaptiveKL(coef=0.1, target=6.0, horizon=1000).updated(12.0, 100)` has `coef` 0.102.
    """

    coef: float
    """Reward units a nat."""
    target: float | None
    """Nats a response, or None for a fixed coefficient."""
    horizon: int
    """Rollouts over which the controller acts."""

    def updated(self, kl: float, n: int) -> "AdaptiveKL":
        """The controller after n rollouts whose mean KL was `kl` nats a response.

        n / horizon counts as 1 at most, so that one large batch cannot turn the penalty into a bonus.
        """
        if self.target is None:
            return self
        assert not math.isnan(kl), "KL is not a number"
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, coef=self.coef * (1.0 + error * min(n / self.horizon, 1.0)))
